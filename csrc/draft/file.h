// Files of the drafters: magic, version, length, content, checksum; numbers little-endian as in memory. A
// file is written under a temporary name and renamed, so that a reader sees the old one or the new one.
#pragma once
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace stillhouse::draft {

// FNV-1a over 64-bit words, the last one filled up with zeros. A step is a bijection of the state, so no
// change within a single word goes unseen.
inline uint64_t checksum(const char* data, size_t size) {
  uint64_t state = 0xcbf29ce484222325u;
  for (size_t at = 0; at < size; at += 8) {
    uint64_t word = 0;
    std::memcpy(&word, data + at, size - at < 8 ? size - at : 8);
    state = (state ^ word) * 0x100000001b3u;
  }
  return state;
}

// An error of the system with a file; Python's OSError.
struct FileError : std::runtime_error {
  FileError(int error, const std::string& path)
      : std::runtime_error(path + ": " + std::strerror(error)), error(error), path(path) {}
  int error;
  std::string path;
};

struct Header {
  char magic[8];
  uint32_t version, reserved;
  uint64_t size, checksum;
};

class Writer {
 public:
  template <class T>
  void put(const T& value) {
    put(&value, 1);
  }
  template <class T>
  void put(const T* values, size_t count) {
    static_assert(std::is_trivially_copyable_v<T>);
    const char* bytes = reinterpret_cast<const char*>(values);
    content_.insert(content_.end(), bytes, bytes + count * sizeof(T));
  }

  void save(const std::string& path, const char (&magic)[9], uint32_t version) const {
    Header header{{}, version, 0, content_.size(), checksum(content_.data(), content_.size())};
    std::memcpy(header.magic, magic, 8);
    // A name of its own for each call; O_EXCL, for another machine may share the folder and the number.
    static std::atomic<uint64_t> calls{0};
    std::string draft;
    int file = -1;
    for (int tries = 0; tries < 100 && file < 0; ++tries) {
      draft = path + ".tmp-" + std::to_string(::getpid()) + "-" + std::to_string(calls++);
      file = ::open(draft.c_str(), O_WRONLY | O_CREAT | O_EXCL, 0666);
      if (file < 0 && errno != EEXIST) break;
    }
    const bool written = file >= 0 && all(file, &header, sizeof header) &&
                         all(file, content_.data(), content_.size()) && ::fsync(file) == 0;
    const int error = errno;
    if (file >= 0) ::close(file);
    if (written && ::rename(draft.c_str(), path.c_str()) == 0) return;
    const int cause = written ? errno : error;
    if (file >= 0) ::unlink(draft.c_str());
    throw FileError(cause, path);
  }

 private:
  static bool all(int file, const void* data, size_t size) {
    const char* from = static_cast<const char*>(data);
    while (size > 0) {
      const ssize_t done = ::write(file, from, size);
      if (done < 0 && errno == EINTR) continue;
      if (done <= 0) return false;
      from += done, size -= size_t(done);
    }
    return true;
  }

  std::vector<char> content_;
};

// The content of a file that is whole; each way in which it may not be has its own line.
class Reader {
 public:
  Reader(const std::string& path, const char (&magic)[9], uint32_t version, const char* what)
      : path_(path) {
    struct stat about;
    if (::stat(path.c_str(), &about) == 0 && S_ISDIR(about.st_mode)) throw FileError(EISDIR, path);
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    if (!file) throw FileError(errno, path);
    const std::streamoff length = file.tellg();
    Header header;
    file.seekg(0);
    if (length < std::streamoff(sizeof header) ||
        !file.read(reinterpret_cast<char*>(&header), sizeof header) ||
        std::memcmp(header.magic, magic, 8) != 0)
      throw std::invalid_argument(path + " is no " + what + ": its first bytes are others'");
    if (header.version != version)
      throw std::invalid_argument(path + " has version " + std::to_string(header.version) +
                                  " of the format, expected " + std::to_string(version));
    if (header.size != uint64_t(length) - sizeof header)
      throw corrupted("it has " + std::to_string(uint64_t(length) - sizeof header) +
                      " bytes of content, its header says " + std::to_string(header.size));
    content_.resize(header.size);
    if (!file.read(content_.data(), std::streamsize(content_.size()))) throw FileError(errno, path);
    if (checksum(content_.data(), content_.size()) != header.checksum)
      throw corrupted("its checksum does not match");
  }

  template <class T>
  T get() {
    T value;
    get(&value, 1);
    return value;
  }
  template <class T>
  void get(T* values, size_t count) {
    if (count > (content_.size() - at_) / sizeof(T)) throw corrupted("it ends too early");
    std::memcpy(values, content_.data() + at_, count * sizeof(T));
    at_ += count * sizeof(T);
  }
  void check(bool holds, const char* what) const {
    if (!holds) throw corrupted(what);
  }
  void end() const { check(at_ == content_.size(), "it goes on behind its end"); }

 private:
  std::invalid_argument corrupted(const std::string& how) const {
    return std::invalid_argument(path_ + " is corrupted: " + how);
  }

  std::string path_;
  std::vector<char> content_;
  size_t at_ = 0;
};

}  // namespace stillhouse::draft
