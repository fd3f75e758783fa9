"""What a verification must not depend on, what it does with broken input, and its compiled form."""

import pytest
import torch
import torch._dynamo.testing
from torch.testing import assert_close

from stillhouse import ops
from stillhouse.ops import divergence_autograd
from stillhouse.ops.random import philox_uniform

MODES = ["greedy", "target", "multi_round", "traversal", "typical"]


def problem(n=6, size=12, vocabulary=9, seed=0, dtype=torch.float32):
    generator = torch.Generator("cpu").manual_seed(seed)
    like = dict(generator=generator, device="cpu")
    parents = (torch.rand(n, size, **like) * torch.arange(size, device="cpu")).int()
    parents[:, 0] = -1
    tokens = torch.randint(0, vocabulary, (n, size), **like).int()
    kind = torch.randint(0, 2, (n, 1), **like).expand(n, size).byte()
    rows = 1.5 * torch.randn(2, n, size, vocabulary, **like)
    made = tokens, parents, kind, *rows.to(dtype)
    return [each.to(torch.get_default_device()) for each in made]


def verify(given, mode="multi_round", *, seed=11, position=None, **words):
    tokens, parents, kind, target, draft = given
    if position is None:
        position = torch.arange(len(tokens)) + 100
    links = ops.tree_build(parents)
    words = {"temperature": 0.9, "seed": seed, "position": position} | words
    return ops.tree_verify(tokens, links, target, draft, mode=mode, kind=kind, **words)


def assert_same(a, b):
    for name, x, y in zip(a._fields, a, b, strict=True):
        assert torch.equal(x, y), name


def rows_of(out, rows):
    return type(out)(*(each[rows] for each in out))


@pytest.mark.parametrize("mode", MODES)
def test_batch(mode, way):
    """Order, splits and other batches change nothing; repeats are equal to the bit."""
    given, position = problem(), torch.arange(6) * 2**33
    out = verify(given, mode, position=position)
    assert_same(out, verify(given, mode, position=position))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted = verify([each[order] for each in given], mode, position=position[order])
    assert_same(permuted, rows_of(out, order))
    for rows in (slice(0, 2), slice(2, 6)):
        part = verify([each[rows] for each in given], mode, position=position[rows])
        assert_same(part, rows_of(out, rows))


@pytest.mark.parametrize("mode", MODES)
def test_padding(mode, way):
    """A larger T, with rows of NaN at padded nodes."""
    given = problem()
    out = verify(given, mode)
    fill = [99, -2, 7, torch.nan, torch.nan]
    padded = []
    for each, value in zip(given, fill, strict=True):
        shape = (len(each), 60, *each.shape[2:])
        padded.append(torch.cat([each, each.new_full(shape, value)], 1))
    larger = verify(padded, mode)
    width = out.path.shape[1]
    assert larger.path.shape[1] == 65
    for name in ("path", "out_tokens"):
        assert torch.equal(getattr(larger, name)[:, :width], getattr(out, name))
        assert (getattr(larger, name)[:, width:] == -1).all()
    for name in ("n_accepted", "accept_prob", "status"):
        assert torch.equal(getattr(larger, name), getattr(out, name))


@pytest.mark.parametrize("mode", MODES)
def test_threads(mode, kernel_way):
    """Fewer than trees, more than trees, more than processors."""
    if isinstance(kernel_way, str):
        pytest.skip("threads of the CPU")
    before, given = torch.get_num_threads(), problem(3, 10, 70_000)
    try:
        for round_ in range(5):
            torch.set_num_threads(1)
            one = verify(given, mode, seed=round_)
            for threads in (2, 4, 7):
                torch.set_num_threads(threads)
                assert_same(one, verify(given, mode, seed=round_))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("mode", MODES)
def test_mixed_dtypes(mode, way):
    """Rows are read as they are: narrower ones give what they give when they are widened before."""
    for narrow in (torch.bfloat16, torch.float16):
        *shared, target, draft = problem(30)
        for rows in ((target.to(narrow), draft), (target, draft.to(narrow))):
            out = verify([*shared, *rows], mode)
            assert_same(out, verify([*shared, *(each.float() for each in rows)], mode))


def test_deep_walk_of_long_rows(kernel_way, reference):
    """Deeper than what the CPU keeps of rows that it has read."""
    if isinstance(kernel_way, str):
        pytest.skip("memory of the CPU")
    columns, depth = 2**20, 5
    tokens, _, _, target, draft = problem(1, depth + 1, columns)
    tokens.fill_(columns - 1)
    draft[..., -1] = target[..., -1] + 0.2  # drafted more often than it is the target's
    parents = torch.arange(-1, depth, dtype=torch.int32)[None]
    given = tokens, parents, torch.zeros_like(tokens).byte(), target, draft
    # The fifth and the fourth are rejected: the walk comes back to the third.
    coins = torch.full((1, depth + 1, 2), 1 - 1e-9, dtype=torch.float64)
    coins[:, 3, 0] = 0
    out = verify(given, "traversal", coins=coins)
    wanted = reference(lambda: verify(given, "traversal", coins=coins))
    assert torch.equal(out.path, wanted.path)
    assert int(out.n_accepted) == 3
    assert_close(out.accept_prob, wanted.accept_prob, rtol=1e-4, atol=0)


@pytest.mark.parametrize("mode", ["target", "multi_round", "traversal"])
def test_random_numbers(mode, way):
    """They are Philox's, by seed, position, node and stream; each of the first two counts."""
    given = problem(40)
    position = torch.arange(40) + 2**40
    out = verify(given, mode, seed=-3, position=position)
    nodes, streams = torch.arange(12)[:, None], torch.arange(2)
    coins = philox_uniform(-3, position[:, None, None], nodes, streams)
    assert_same(out, verify(given, mode, coins=coins))
    assert_same(out, verify(given, mode, seed=2**64 - 3, position=position))
    assert_same(out, verify(given, mode, seed=torch.full((40,), -3), position=position))
    for other in (dict(seed=-4, position=position), dict(seed=-3, position=position + 1)):
        assert not torch.equal(out.out_tokens, verify(given, mode, **other).out_tokens)


def test_root_alone_is_a_sample(way):
    """Plain decoding: `sample_categorical` draws what a tree without drafts does."""
    logits, parents = torch.randn(50, 1, 30), torch.full((50, 1), -1, dtype=torch.int32)
    position = torch.arange(50)
    links = ops.tree_build(parents)
    words = dict(temperature=1.0, seed=8, position=position)
    out = ops.tree_verify(parents, links, logits, **words)
    drawn = ops.sample_categorical(logits[:, 0], seed=8, position=position)
    assert torch.equal(out.out_tokens[:, 0].long(), drawn)
    assert out.path.tolist() == [[0]] * 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_greedy(dtype, way):
    """The path of the argmax, lowest token of ties; of equal siblings the first."""
    tokens, parents, _, target, _ = problem(60, 30, 3, dtype=dtype)
    target = target.round()  # ties
    out = ops.tree_verify(tokens, ops.tree_build(parents), target, temperature=0)
    for row in range(60):
        node, path, written = 0, [0], []
        while True:
            logits = target[row, node].tolist()
            written.append(logits.index(max(logits)))
            same = [
                child
                for child in range(30)
                if parents[row, child] == node and tokens[row, child] == written[-1]
            ]
            if not same:
                break
            node = same[0]
            path.append(node)
        assert out.path[row].tolist() == path + [-1] * (30 - len(path))
        assert out.out_tokens[row].tolist() == written + [-1] * (30 - len(written))
        assert out.n_accepted[row] == len(path) - 1
    assert (out.accept_prob == 1).all()
    assert out.n_accepted.max() >= 4


@pytest.mark.parametrize("mode", ["multi_round", "traversal"])
def test_equal_models_accept_all(mode, way):
    tokens, _, kind, target, _ = problem(20)
    chain = torch.arange(-1, 11, dtype=torch.int32).expand(20, -1)
    out = verify([tokens, chain, torch.ones_like(kind), target, target], mode)
    assert (out.n_accepted == 11).all()
    torch.testing.assert_close(out.accept_prob, torch.ones(20), atol=1e-5, rtol=0)


def test_typical(way):
    """The threshold min(epsilon, delta exp(-H))."""
    p = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    links = ops.tree_build(torch.tensor([[-1, 0, 0]], dtype=torch.int32))
    tokens = torch.tensor([[0, 3, 1]], dtype=torch.int32)
    exp_h = 2 ** (0.5 + 0.5 + 0.375 + 0.375)
    for epsilon, delta, node in (
        (0.2, 10, 2),
        (0.1, 10, 1),
        (0.3, 10, 0),
        (1, 0.2 * exp_h, 2),
        (1, 0.12 * exp_h, 1),
        (1, 0.26 * exp_h, 0),
    ):
        rows = p.expand(1, 3, 4)
        words = dict(mode="typical", seed=0, is_prob=True, epsilon=epsilon, delta=delta)
        out = ops.tree_verify(tokens, links, rows, **words)
        assert out.path[0, 1] == (node or -1), (epsilon, delta)


def test_auto(way):
    given = problem()
    tokens, parents, kind, target, draft = given
    links, words = ops.tree_build(parents), dict(seed=1, position=torch.arange(6))

    def auto(draft=None, **more):
        return ops.tree_verify(tokens, links, target, draft, kind=kind, **words, **more)

    def by(mode, draft=None, **more):
        return ops.tree_verify(tokens, links, target, draft, kind=kind, mode=mode, **words, **more)

    assert_same(auto(draft, temperature=0.0), by("greedy"))
    assert_same(auto(temperature=0.8), by("target", temperature=0.8))
    assert_same(auto(draft), by("traversal", draft, temperature=torch.ones(6)))


@pytest.mark.parametrize(
    ("mode", "is_prob"), [*((mode, True) for mode in MODES), ("greedy", False)]
)
def test_status(mode, is_prob, way):
    """Each break, at the root; and nothing where it is not looked at."""
    given = problem(8, dtype=torch.float64)
    tokens, parents, kind, target, draft = given
    if is_prob:
        target, draft = target.softmax(-1), draft.softmax(-1)
    broken, words = target.clone(), dict(is_prob=is_prob, temperature=None)
    broken[0, 0, 3] = torch.nan
    broken[1, 0, 3] = torch.inf
    expected = [1, 1, 0, 0, 0, 0, 0, 0]
    if is_prob:
        broken[2, 0] *= 1.01
        broken[3, 0, :2] += torch.tensor([-0.9, 0.9])
        expected[2:4] = 2, 2
    bad = tokens.clone()
    first = ops.tree_build(parents).first_child[4:6, 0].long()
    bad[torch.tensor([4, 5]), first] = torch.tensor([-1, 9], dtype=torch.int32)
    expected[4:6] = 4, 4
    out = verify([bad, parents, kind, broken, draft], mode, **words)
    assert (out.status & 7).tolist() == expected
    for row, status in enumerate(expected):
        if status:
            assert out.n_accepted[row] == 0
            assert (out.out_tokens[row] == -1).all()
        else:
            assert out.out_tokens[row, out.n_accepted[row]] >= 0
    reasons = {1: "NaN", 2: "sum to 1", 4: "outside of the vocabulary"}
    for row, status in enumerate(expected):
        one = [each[row : row + 1] for each in (bad, parents, kind, broken, draft)]
        if status:
            with pytest.raises(ValueError, match=f"tree 0 could not be .*{reasons[status]}"):
                verify(one, mode, position=3, check=True, **words)
        else:
            verify(one, mode, position=3, check=True, **words)


@pytest.mark.parametrize("mode", ["multi_round", "traversal"])
def test_broken_draft_rows(mode, way):
    """A row that no sampled child needs is not looked at."""
    tokens, parents, kind, target, draft = problem(4)
    broken = draft.clone()
    broken[:, 0] = torch.nan
    assert (verify([tokens, parents, kind, target, broken], mode).status & 7 == 1).all()
    fixed = torch.full_like(kind, 2)
    assert (verify([tokens, parents, fixed, target, broken], mode).status & 7 == 0).all()
    masked = torch.full_like(target, -torch.inf)
    assert (verify([tokens, parents, fixed, masked, draft], mode).status & 7 == 1).all()


def test_vanished_residual(way):
    """A rejection that leaves nothing: the target stays what it was."""
    p = torch.tensor([[[1.0, 0.0]] * 2])
    links = ops.tree_build(torch.tensor([[-1, 0]], dtype=torch.int32))
    words = dict(mode="multi_round", is_prob=True, coins=torch.full((1, 2, 2), 1.0).double())
    tokens = torch.zeros(1, 2, dtype=torch.int32)
    out = ops.tree_verify(tokens, links, p, p, **words)
    assert out.status.tolist() == [8]
    assert out.out_tokens.tolist() == [[0, -1]]


def test_below_the_impossible(way):
    """Rows below a node that cannot be accepted are not read."""
    links = ops.tree_build(torch.tensor([[-1, 0, 1, 2, 0]], dtype=torch.int32))
    p = torch.full((1, 5, 3), torch.nan)
    p[0, 0], p[0, 4] = torch.tensor([0.0, 0.5, 0.5]), torch.tensor([0.0, 0.0, 1.0])
    q = p.clone()
    q[0, 0] = torch.tensor([0.5, 0.5, 0.0])
    tokens = torch.tensor([[0, 0, 1, 1, 1]], dtype=torch.int32)
    words = dict(mode="traversal", is_prob=True, check=True)
    out = ops.tree_verify(tokens, links, p, q, coins=torch.full((1, 5, 2), 1e-9).double(), **words)
    assert out.out_tokens[0].tolist() == [2, -1, -1, -1, -1]


@pytest.mark.parametrize("mode", MODES)
def test_opcheck(mode, kernel_way):
    S = divergence_autograd.kernels()
    for size in (12, 64, 80):
        tokens, parents, kind, target, draft = problem(3, size)
        torch.library.opcheck(S.tree_build.default, (parents,))
        links, place = ops.tree_build(parents), torch.arange(3)
        temperature = torch.ones(3, dtype=torch.float64)
        rows = tokens, *links[:3], target, draft, kind, temperature, place, place, None
        given = *rows, MODES.index(mode), False, 0.09, 0.3
        torch.library.opcheck(S.tree_verify.default, given)


def test_compiled(kernel_way):
    """One graph for all sizes."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def step(tokens, parents, target, draft, seed, position):
        links = ops.tree_build(parents)
        mask = ops.tree_mask(links)
        out = ops.tree_verify(
            tokens, links, target * 1, draft, temperature=0.7, seed=seed, position=position
        )
        return out.out_tokens + 0, ops.kv_gather_indices(out.path, 5), mask

    graphs = []
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for n, size in ((4, 12), (5, 13), (7, 30)):
        tokens, parents, _, target, draft = problem(n, size)
        given = tokens, parents, target, draft, torch.arange(n), torch.arange(n)
        for a, b in zip(compiled(*given), step(*given), strict=True):
            assert torch.equal(a, b)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1]
