"""State dicts of other libraries: the same codes as the quantizers they are of."""

import importlib
import importlib.util
import sys
import types

import pytest
import torch

from stillhouse.nn import GroupedResidualVQ, ResidualVQ


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scattered(tables, seed=1):
    """Tables of shrinking random codes, in place of zeros."""
    for stage, table in enumerate(tables):
        drawn = rows(*table.shape, seed=seed + stage) * 0.7**stage
        with torch.no_grad():
            table.copy_(drawn)


@pytest.fixture
def module_of(monkeypatch):
    """module_of("dac.nn.quantize"): a module of an installed package. Packages above it are not
    executed, since they import what is not needed here."""

    def load(name, *bare):
        above = name.partition(".")[0]
        found = importlib.util.find_spec(above)
        if found is None:
            pytest.skip(f"{above} is not installed")
        root = found.submodule_search_locations[0]
        for known in [n for n in sys.modules if n.partition(".")[0] == above]:
            monkeypatch.delitem(sys.modules, known)
        for package in bare:
            empty = types.ModuleType(package)
            empty.__path__ = ["/".join([root, *package.split(".")[1:]])]
            monkeypatch.setitem(sys.modules, package, empty)
        return importlib.import_module(name)

    return load


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({}, {}),
        ({"use_cosine_sim": True}, {"metric": "cosine"}),
        ({"codebook_dim": 8}, {}),
        ({"shared_codebook": True}, {}),
        ({"kmeans_init": True, "threshold_ema_dead_code": 2}, {}),
    ],
    ids=["plain", "cosine", "projected", "shared", "kmeans"],
)
def test_lucidrains(theirs, ours):
    package = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    original = package.ResidualVQ(dim=16, codebook_size=64, num_quantizers=4, **theirs)
    for seed in range(3):
        original(rows(2, 300, 16, seed=seed))  # moves its tables
    original.eval()
    quantizer = ResidualVQ.from_state_dict(original.state_dict(), "lucidrains", **ours).eval()
    x = rows(2, 200, 16, seed=9)
    out, codes, _ = original(x)
    assert (quantizer.encode(x) == codes).all()
    torch.testing.assert_close(quantizer(x).out, out)
    assert quantizer.shared_codebook == ("shared_codebook" in theirs)
    assert (codes.flatten(0, 1).amax(0) > 32).all()  # of many codes


def test_lucidrains_in_groups():
    package = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    original = package.GroupedResidualVQ(
        dim=24, groups=3, codebook_size=32, num_quantizers=3, codebook_dim=6
    ).eval()
    prefixed = {f"model.{name}": value for name, value in original.state_dict().items()}
    quantizer = GroupedResidualVQ.from_state_dict(prefixed, "lucidrains").eval()
    assert quantizer.groups == 3
    x = rows(2, 50, 24)
    out, codes, _ = original(x)
    assert (quantizer(x).codes == codes).all()
    torch.testing.assert_close(quantizer(x).out, out)


def test_encodec(module_of):
    core = module_of("encodec.quantization.core_vq", "encodec", "encodec.quantization")
    original = core.ResidualVectorQuantization(
        dim=16, codebook_size=64, num_quantizers=5, kmeans_init=False
    ).eval()
    scattered([layer.codebook for layer in original.layers])
    state = {f"quantizer.vq.{name}": value for name, value in original.state_dict().items()}
    quantizer = ResidualVQ.from_state_dict(state, "encodec").eval()
    x = rows(2, 100, 16, seed=3)
    for stages in (None, 2):
        codes = original.encode(x.mT, stages)
        assert (quantizer.encode(x, stages) == codes.permute(1, 2, 0)).all()
    torch.testing.assert_close(quantizer.decode(codes.permute(1, 2, 0)), original.decode(codes).mT)


def test_dac(module_of):
    quantize = module_of("dac.nn.quantize", "dac", "dac.nn")
    torch.manual_seed(0)
    original = quantize.ResidualVectorQuantize(24, n_codebooks=4, codebook_size=64, codebook_dim=8)
    original.eval()
    with torch.no_grad():
        for each in original.quantizers:
            for layer in (each.in_proj, each.out_proj):
                layer.weight_g *= rows(*layer.weight_g.shape, seed=4).abs() + 0.5
    state = {f"quantizer.{name}": value for name, value in original.state_dict().items()}
    assert any(name.endswith("weight_g") for name in state)
    quantizer = ResidualVQ.from_state_dict(state, "dac").eval()
    check_dac(quantizer, original, lambda x: original(x))


def check_dac(quantizer, original, forward):
    x = rows(2, 100, 24, seed=2)
    out, codes, latents, *_ = forward(x.mT)
    assert (quantizer(x).codes == codes.mT).all()
    torch.testing.assert_close(quantizer(x).out, out.mT, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(quantizer.decode(codes.mT), out.mT, atol=1e-5, rtol=1e-5)
    for n in (4, 2):
        given = latents[:, : n * 8]
        again = quantizer.from_latents(given.mT)
        assert (again.codes == codes.mT[..., :n]).all()
        expected = original.from_latents(given)[0].mT
        torch.testing.assert_close(again.out, expected, atol=1e-5, rtol=1e-5)


def test_dac_losses_are_theirs_in_training(module_of):
    quantize = module_of("dac.nn.quantize", "dac", "dac.nn")
    torch.manual_seed(0)
    original = quantize.ResidualVectorQuantize(24, n_codebooks=3, codebook_size=32, codebook_dim=8)
    quantizer = ResidualVQ.from_state_dict(original.state_dict(), "dac").train()
    theirs, ours = (rows(2, 40, 24).requires_grad_() for _ in range(2))
    out, _, _, commitment, codebook = original(theirs.mT)
    (out.square().mean() + 0.25 * commitment + codebook).backward()
    found = quantizer(ours)
    (found.out.square().mean() + found.commit_loss.sum()).backward()
    torch.testing.assert_close(found.commit_loss.sum(), 0.25 * commitment)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)
    tables = torch.stack([each.codebook.weight.grad for each in original.quantizers])
    torch.testing.assert_close(quantizer.tables.grad[0], tables, atol=1e-6, rtol=1e-4)
    bias = torch.stack([each.out_proj.bias.grad for each in original.quantizers])
    torch.testing.assert_close(quantizer.out_of_bias.grad, bias, atol=1e-6, rtol=1e-4)


class TestTransformers:
    """Models of small configurations."""

    @pytest.fixture(autouse=True)
    def _installed(self):
        self.package = pytest.importorskip("transformers")
        torch.manual_seed(0)

    def test_encodec(self):
        config = self.package.EncodecConfig(
            hidden_size=16,
            num_filters=4,
            codebook_size=64,
            codebook_dim=16,
            target_bandwidths=[1.8, 2.7],
        )
        model = self.package.EncodecModel(config).eval()
        scattered([layer.codebook.embed for layer in model.quantizer.layers])
        quantizer = ResidualVQ.from_state_dict(model.state_dict(), "encodec").eval()
        x = rows(2, 50, 16, seed=3)
        for bandwidth, stages in ((2.7, 6), (1.8, 4)):  # 450 bits a second of each stage
            codes = model.quantizer.encode(x.mT, bandwidth)
            assert (quantizer.encode(x, stages) == codes.permute(1, 2, 0)).all()
        expected = model.quantizer.decode(codes).mT
        torch.testing.assert_close(quantizer.decode(codes.permute(1, 2, 0)), expected)

    def test_mimi(self):
        from transformers.models.mimi.modeling_mimi import MimiSplitResidualVectorQuantizer

        config = self.package.MimiConfig(
            hidden_size=24,
            codebook_size=64,
            codebook_dim=8,
            vector_quantization_hidden_dimension=8,
            num_quantizers=5,
        )
        original = MimiSplitResidualVectorQuantizer(config).eval()
        halves = {
            "semantic": original.semantic_residual_vector_quantizer,
            "acoustic": original.acoustic_residual_vector_quantizer,
        }
        for number, half in enumerate(halves.values()):
            scattered([layer.codebook.embed_sum for layer in half.layers], seed=10 * number)
            for layer in half.layers:
                layer.codebook.cluster_usage.copy_(rows(64).abs() + 0.5)
        state = original.state_dict()
        with pytest.raises(ValueError, match="several: give a prefix of acoustic"):
            ResidualVQ.from_state_dict(state, "mimi")
        x = rows(2, 50, 24, seed=3)
        codes = original.encode(x.mT).permute(1, 2, 0)
        ours = [ResidualVQ.from_state_dict(state, "mimi", prefix=name).eval() for name in halves]
        found = torch.cat([quantizer.encode(x) for quantizer in ours], -1)
        assert (found == codes).all()
        out = ours[0].decode(codes[..., :1]) + ours[1].decode(codes[..., 1:])
        torch.testing.assert_close(out, original.decode(codes.mT).mT)

    def test_dac(self):
        from transformers.models.dac.modeling_dac import DacResidualVectorQuantizer

        config = self.package.DacConfig(
            hidden_size=24, n_codebooks=4, codebook_size=64, codebook_dim=8
        )
        original = DacResidualVectorQuantizer(config).eval()
        quantizer = ResidualVQ.from_state_dict(original.state_dict(), "dac").eval()
        check_dac(quantizer, original, lambda x: original(x))


def test_moshis_own_names():
    tables = [rows(8, 4, seed=n) for n in range(3)]
    usage = rows(8, seed=5).abs() + 1
    state = {}
    for n, table in enumerate(tables):
        below = f"quantizer.rvq_rest.vq.layers.{n}._codebook."
        state[f"{below}embedding_sum"], state[f"{below}cluster_usage"] = table, usage
    state["quantizer.rvq_rest.input_proj.weight"] = rows(4, 6, 1)
    state["quantizer.rvq_rest.output_proj.weight"] = rows(6, 4, 1)
    quantizer = ResidualVQ.from_state_dict(state, "mimi", prefix="quantizer.rvq_rest")
    assert (quantizer.dim, quantizer.codebook_dim, quantizer.into_bias) == (6, 4, None)
    torch.testing.assert_close(quantizer.codebooks[2], tables[2] / usage[:, None])
    torch.testing.assert_close(quantizer.counts[0, 1], usage)


@pytest.mark.parametrize(
    ("state", "layout", "message"),
    [
        ({}, "encodec", "found none"),
        ({}, "soundstream", "layout must be one of lucidrains, encodec, mimi, dac"),
        (
            {f"layers.{n}._codebook.embed": torch.zeros(1, 4 + n, 3) for n in range(2)},
            "lucidrains",
            "as many codes of one width",
        ),
        ({"layers.1._codebook.embed": torch.zeros(4, 3)}, "encodec", "1 tables are not 2 stages"),
        (
            {"layers.0._codebook.embed": torch.zeros(2, 4, 3)},
            "lucidrains",
            "tables of 2 heads",
        ),
        ({"layers.0.codebook.embed_sum": torch.zeros(4, 3)}, "mimi", "no 'cluster_usage'"),
        ({"quantizers.0.codebook.weight": torch.zeros(4, 3)}, "dac", "no 'in_proj.weight'"),
        (
            {
                "quantizers.0.codebook.weight": torch.zeros(4, 3),
                "quantizers.0.in_proj.weight": torch.zeros(3, 8, 1),
            },
            "dac",
            "no 'in_proj.bias'",
        ),
        (
            {
                "layers.0.codebook.embed": torch.zeros(4, 3),
                "layers.0.codebook.cluster_size": torch.zeros(4),
                "layers.1.codebook.embed": torch.zeros(4, 3),
            },
            "encodec",
            "some lack their counts",
        ),
    ],
)
def test_what_is_refused(state, layout, message):
    with pytest.raises(ValueError, match=message):
        ResidualVQ.from_state_dict(state, layout)
