// The module `stillhouse._draft`: numpy in, numpy out. Tables and searches release the interpreter's lock
// while they work.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "ngram.h"
#include "search.h"

namespace py = pybind11;
using namespace stillhouse::draft;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

void require(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument(what);
}

void require_at_least(int32_t least, int32_t value, const char* name) {
  require(value >= least, std::string("expected ") + name + " >= " + std::to_string(least) +
                              ", got " + std::to_string(value));
}

void require_between(int32_t least, int32_t most, int32_t value, const char* name) {
  require(value >= least && value <= most, std::string("expected ") + name + " in [" +
                                               std::to_string(least) + ", " + std::to_string(most) +
                                               "], got " + std::to_string(value));
}

// Tokens [n], all of them at least 0 and below the vocabulary where there is one.
struct Tokens {
  Tokens(const Array<int32_t>& array, int32_t vocabulary = 0)
      : data(array.data()), size(size_t(array.size())) {
    require(array.ndim() == 1, "expected token ids [n], got " + std::to_string(array.ndim()) +
                                   " dimensions: give one text at a time");
    for (size_t i = 0; i < size; ++i)
      if (data[i] < 0 || (vocabulary > 0 && data[i] >= vocabulary))
        throw std::invalid_argument(
            "expected token ids " +
            (vocabulary > 0 ? "in [0, " + std::to_string(vocabulary) + ")" : std::string(">= 0")) +
            ", got " + std::to_string(data[i]) + " at place " + std::to_string(i));
  }
  const int32_t* data;
  size_t size;
};

template <class T>
Array<T> to_numpy(const std::vector<T>& values) {
  Array<T> array(py::ssize_t(values.size()));
  std::copy(values.begin(), values.end(), array.mutable_data());
  return array;
}

py::tuple to_numpy(const Tree& tree) {
  return py::make_tuple(to_numpy(tree.tokens), to_numpy(tree.parents), to_numpy(tree.scores));
}

std::unique_ptr<TrigramTable> make_table(int32_t successors, double step, double cap,
                                         int64_t capacity, int32_t vocabulary) {
  require(successors >= 1 && successors <= kMostSuccessors,
          "expected successors in [1, " + std::to_string(kMostSuccessors) + "], got " +
              std::to_string(successors));
  require(step > 0 && std::isfinite(step),
          "expected a finite step > 0, got " + std::to_string(step));
  require(cap > 0 && std::isfinite(cap), "expected a finite cap > 0, got " + std::to_string(cap));
  require(capacity >= 1 && capacity < kNone,
          "expected capacity in [1, 2^32 - 2] bigrams, got " + std::to_string(capacity));
  return std::make_unique<TrigramTable>(successors, step, cap, uint32_t(capacity), vocabulary);
}

void add_texts(TrigramTable& table, const std::vector<Array<int32_t>>& texts) {
  std::vector<std::pair<const int32_t*, size_t>> spans;
  size_t all = 0;
  for (const auto& text : texts) {
    const Tokens tokens(text, table.vocabulary());
    spans.push_back({tokens.data, tokens.size});
    all += tokens.size;
  }
  require(all < kNone, "expected fewer than 2^32 tokens at once: add the texts in parts");
  py::gil_scoped_release release;
  table.add(spans);
}

void update(TrigramTable& table, const Array<int32_t>& window) {
  const Tokens tokens(window, table.vocabulary());
  py::gil_scoped_release release;
  table.update(tokens.data, tokens.size);
}

py::tuple successors_of(const TrigramTable& table, int32_t a, int32_t b) {
  std::vector<int32_t> tokens;
  std::vector<double> scores;
  Successor found[kMostSuccessors];
  {
    py::gil_scoped_release release;
    const auto lock = table.reading();
    const int32_t count = table.find(bigram(a, b), found);
    for (int32_t i = 0; i < count; ++i)
      tokens.push_back(found[i].token), scores.push_back(found[i].score);
  }
  return py::make_tuple(to_numpy(tokens), to_numpy(scores));
}

// The last bigram of a context, and the root alone where it has none.
template <class Draft>
py::tuple drafted(const TrigramTable& table, const Array<int32_t>& context, Draft draft) {
  const Tokens tokens(context, table.vocabulary());
  require(tokens.size > 0, "expected a context of at least one token, got none");
  const int32_t last = tokens.data[tokens.size - 1];
  Tree tree(last);
  if (tokens.size > 1) {
    py::gil_scoped_release release;
    tree = draft(tokens.data[tokens.size - 2], last);
  }
  return to_numpy(tree);
}

Search make_search(const TrigramTable& table, int32_t iterations, int32_t depth, int32_t keep,
                   int32_t max_nodes, double c1, double c2) {
  require_between(1, kMostIterations, iterations, "iterations");
  require_between(1, kMostDepth - 1, depth, "depth");  // and a successor behind
  require_at_least(1, keep, "keep");
  require_at_least(1, max_nodes, "max_nodes");
  require(c1 >= 0 && std::isfinite(c1), "expected a finite c1 >= 0, got " + std::to_string(c1));
  require(c2 > 0 && std::isfinite(c2), "expected a finite c2 > 0, got " + std::to_string(c2));
  return Search(table, {iterations, depth, keep, max_nodes, c1, c2});
}

py::tuple draft_beam(const TrigramTable& table, const Array<int32_t>& context, int32_t depth,
                     int32_t width, int32_t max_nodes) {
  require_between(1, kMostDepth, depth, "depth");
  require_at_least(1, width, "width");
  require_at_least(1, max_nodes, "max_nodes");
  return drafted(table, context, [&](int32_t before_last, int32_t last) {
    return beam(table, before_last, last, depth, width, max_nodes);
  });
}

std::unique_ptr<NGramTable> make_ngrams(int32_t shortest, int32_t longest, int64_t capacity) {
  require(shortest >= 1 && shortest <= longest && longest <= NGramTable::kLongest,
          "expected 1 <= shortest <= longest <= " + std::to_string(NGramTable::kLongest) +
              ", got " + std::to_string(shortest) + " and " + std::to_string(longest));
  require(capacity >= 2 && capacity <= int64_t(NGramTable::kMostTokens),
          "expected capacity in [2, 2^30] tokens, got " + std::to_string(capacity));
  return std::make_unique<NGramTable>(shortest, longest, uint32_t(capacity));
}

py::tuple draft_ngrams(const NGramTable& table, const Array<int32_t>& context, int32_t length,
                       int32_t branches, int32_t max_nodes) {
  require_at_least(1, length, "length");
  require_between(1, kMostSuccessors, branches, "branches");
  require_at_least(1, max_nodes, "max_nodes");
  const Tokens tokens(context);
  require(tokens.size > 0, "expected a context of at least one token, got none");
  Tree tree(0);
  {
    py::gil_scoped_release release;
    tree = table.draft(tokens.data, tokens.size, {length, branches, max_nodes});
  }
  return to_numpy(tree);
}

// ---- trees of batches ----

py::tuple expand(const Array<float>& log_probs, const Array<float>& scores, int32_t k,
                 int32_t width) {
  require(log_probs.ndim() == 3 && scores.ndim() == 2 && scores.shape(0) == log_probs.shape(0) &&
              scores.shape(1) == log_probs.shape(1),
          "expected log_probs [B, F, V] and scores [B, F]");
  const py::ssize_t batch = log_probs.shape(0), nodes = log_probs.shape(1), v = log_probs.shape(2);
  require(k >= 1 && k <= v,
          "expected k in [1, " + std::to_string(v) + "], got " + std::to_string(k));
  require(width >= 1 && width <= nodes * k,
          "expected width in [1, " + std::to_string(nodes * k) + "], got " + std::to_string(width));
  Array<int32_t> tokens({batch, nodes * k}), parents({batch, nodes * k}),
      frontier({batch, py::ssize_t(width)});
  Array<float> sums({batch, nodes * k});
  const float *from = log_probs.data(), *before = scores.data();
  int32_t *to_tokens = tokens.mutable_data(), *to_parents = parents.mutable_data(),
          *to_frontier = frontier.mutable_data();
  float* to_sums = sums.mutable_data();
  {
    py::gil_scoped_release release;
    for (py::ssize_t b = 0; b < batch; ++b) {
      const py::ssize_t at = b * nodes * k;
      expand_level(from + b * nodes * v, before + b * nodes, nodes, v, k, width, to_tokens + at,
                   to_parents + at, to_sums + at, to_frontier + b * width);
    }
  }
  return py::make_tuple(tokens, parents, sums, frontier);
}

void check_parents(const int32_t* parents, py::ssize_t count) {
  bool padded = false;
  for (py::ssize_t i = 0; i < count; ++i) {
    const bool fits =
        i == 0 ? parents[i] == -1 : parents[i] == -2 || (parents[i] >= 0 && parents[i] < i);
    padded = parents[i] == -2;
    require(fits && !(i == 0 && padded),
            "expected parents[0] = -1, then 0 <= parents[i] < i or -2 for padding, got " +
                std::to_string(parents[i]) + " at node " + std::to_string(i));
  }
}

py::tuple dynamic_tree(const Array<int32_t>& tokens, const Array<int32_t>& parents,
                       const Array<float>& scores, int32_t total) {
  require_at_least(1, total, "total");
  require(tokens.ndim() == 2 && parents.ndim() == 2 && scores.ndim() == 2 &&
              std::equal(tokens.shape(), tokens.shape() + 2, parents.shape()) &&
              std::equal(tokens.shape(), tokens.shape() + 2, scores.shape()) && tokens.shape(1) > 0,
          "expected tokens, parents and scores [B, N] with N >= 1");
  const py::ssize_t batch = tokens.shape(0), count = tokens.shape(1), kept = total;
  Array<int32_t> to_tokens({batch, kept}), to_parents({batch, kept}), chosen({batch, kept});
  Array<float> to_scores({batch, kept});
  std::vector<int32_t> place(count);
  for (py::ssize_t b = 0; b < batch; ++b) {
    const int32_t *token = tokens.data() + b * count, *parent = parents.data() + b * count;
    const float* score = scores.data() + b * count;
    check_parents(parent, count);
    for (py::ssize_t i = 1; i < count; ++i)
      require(score[i] == score[i],
              "expected scores without NaN, got one at node " + std::to_string(i));
    int32_t* at = chosen.mutable_data() + b * kept;
    rerank(parent, score, count, total, at);
    for (py::ssize_t i = 0; i < kept; ++i) {
      const py::ssize_t to = b * kept + i;
      const int32_t from = at[i];
      if (from >= 0) place[from] = int32_t(i);
      to_tokens.mutable_data()[to] = from < 0 ? 0 : token[from];
      to_parents.mutable_data()[to] = from < 0 ? -2 : from == 0 ? -1 : place[parent[from]];
      to_scores.mutable_data()[to] = from < 0 ? kNever : score[from];
    }
  }
  return py::make_tuple(to_tokens, to_parents, to_scores, chosen);
}

// Node i > 0 of a fixed tree is the ranks[i]-th best token of the row of its depth.
py::tuple static_tree(const Array<int32_t>& roots, const Array<float>& log_probs,
                      const Array<int32_t>& parents, const Array<int32_t>& ranks) {
  require(roots.ndim() == 1 && log_probs.ndim() == 3 && log_probs.shape(0) == roots.shape(0),
          "expected roots [B] and log_probs [B, D, V]");
  require(parents.ndim() == 1 && ranks.ndim() == 1 && parents.size() == ranks.size() &&
              parents.size() > 0,
          "expected parents and ranks [T] with T >= 1");
  const py::ssize_t batch = roots.shape(0), rows = log_probs.shape(1), v = log_probs.shape(2);
  const py::ssize_t count = parents.size();
  check_parents(parents.data(), count);
  std::vector<int32_t> depth(count, 0), most(rows, 0);
  for (py::ssize_t i = 1; i < count; ++i) {
    const int32_t parent = parents.at(i), rank = ranks.at(i);
    require(parent >= 0, "expected a fixed tree without padding");
    depth[i] = depth[parent] + 1;
    require(depth[i] <= rows, "expected a tree at most as deep as log_probs has rows (" +
                                  std::to_string(rows) + "), got depth " +
                                  std::to_string(depth[i]));
    require(rank >= 0 && rank < v,
            "expected ranks in [0, " + std::to_string(v) + "), got " + std::to_string(rank));
    most[depth[i] - 1] = std::max(most[depth[i] - 1], rank + 1);
  }
  Array<int32_t> tokens({batch, count});
  Array<float> scores({batch, count});
  const float* from = log_probs.data();
  int32_t* to_tokens = tokens.mutable_data();
  float* to_scores = scores.mutable_data();
  std::vector<std::vector<int32_t>> index(rows);
  std::vector<std::vector<float>> value(rows);
  for (py::ssize_t b = 0; b < batch; ++b) {
    for (py::ssize_t d = 0; d < rows; ++d) {
      index[d].resize(most[d]), value[d].resize(most[d]);
      if (most[d] == 0) continue;
      largest(from + (b * rows + d) * v, v, most[d], index[d].data(), value[d].data());
      require(index[d].back() >= 0, "expected at least " + std::to_string(most[d]) +
                                        " tokens that are not -inf or NaN in row " +
                                        std::to_string(d));
    }
    for (py::ssize_t i = 0; i < count; ++i) {
      const py::ssize_t to = b * count + i;
      const int32_t rank = ranks.at(i), d = depth[i] - 1;
      to_tokens[to] = i == 0 ? roots.at(b) : index[d][rank];
      to_scores[to] = i == 0 ? 0.f : to_scores[b * count + parents.at(i)] + value[d][rank];
    }
  }
  return py::make_tuple(tokens, scores);
}

}  // namespace

PYBIND11_MODULE(_draft, m) {
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const FileError& error) {
      errno = error.error;
      PyErr_SetFromErrnoWithFilename(PyExc_OSError, error.path.c_str());
    }
  });
  const auto released = py::call_guard<py::gil_scoped_release>();

  py::class_<TrigramTable>(m, "TrigramTable")
      .def(py::init(&make_table), py::arg("successors"), py::arg("step"), py::arg("cap"),
           py::arg("capacity"), py::arg("vocabulary"))
      .def("add", &add_texts, py::arg("texts").noconvert())
      .def("update", &update, py::arg("window").noconvert())
      .def("successors_of", &successors_of)
      .def("beam", &draft_beam, py::arg("context").noconvert(), py::arg("depth"), py::arg("width"),
           py::arg("max_nodes"))
      .def("save", &TrigramTable::save, released)
      .def_static("load", &TrigramTable::load, released)
      .def("__len__", &TrigramTable::size)
      .def_property_readonly("nbytes", &TrigramTable::bytes)
      .def_property_readonly("successors", &TrigramTable::successors)
      .def_property_readonly("step", &TrigramTable::step)
      .def_property_readonly("cap", &TrigramTable::cap)
      .def_property_readonly("capacity", &TrigramTable::capacity)
      .def_property_readonly("vocabulary", &TrigramTable::vocabulary);

  py::class_<Search>(m, "Search")
      .def(py::init(&make_search), py::keep_alive<1, 2>(), py::arg("table"), py::arg("iterations"),
           py::arg("depth"), py::arg("keep"), py::arg("max_nodes"), py::arg("c1"), py::arg("c2"))
      .def(
          "draft",
          [](const Search& search, const Array<int32_t>& context, uint64_t seed, uint64_t step) {
            return drafted(search.table(), context, [&](int32_t before_last, int32_t last) {
              return search.draft(before_last, last, seed, step);
            });
          },
          py::arg("context").noconvert(), py::arg("seed"), py::arg("step"));
  m.def("puct", &puct, py::arg("sum"), py::arg("visits"), py::arg("score"),
        py::arg("parent_visits"), py::arg("c1"), py::arg("c2"));

  py::class_<NGramTable>(m, "NGramTable")
      .def(py::init(&make_ngrams), py::arg("shortest"), py::arg("longest"), py::arg("capacity"))
      .def(
          "add",
          [](NGramTable& table, const Array<int32_t>& text) {
            const Tokens tokens(text);
            py::gil_scoped_release release;
            table.add(tokens.data, tokens.size);
          },
          py::arg("text").noconvert())
      .def("draft", &draft_ngrams, py::arg("context").noconvert(), py::arg("length"),
           py::arg("branches"), py::arg("max_nodes"))
      .def("save", &NGramTable::save, released)
      .def_static("load", &NGramTable::load, released)
      .def("__len__", &NGramTable::size)
      .def_property_readonly("nbytes", &NGramTable::bytes)
      .def_property_readonly("shortest", &NGramTable::shortest)
      .def_property_readonly("longest", &NGramTable::longest)
      .def_property_readonly("capacity", &NGramTable::capacity);

  m.def("expand", &expand, py::arg("log_probs").noconvert(), py::arg("scores").noconvert(),
        py::arg("k"), py::arg("width"));
  m.def("dynamic_tree", &dynamic_tree, py::arg("tokens").noconvert(),
        py::arg("parents").noconvert(), py::arg("scores").noconvert(), py::arg("total"));
  m.def("static_tree", &static_tree, py::arg("roots").noconvert(), py::arg("log_probs").noconvert(),
        py::arg("parents").noconvert(), py::arg("ranks").noconvert());
}
