"""Small runs of experiments/continual on data made here: tasks, what methods keep, memories against NumPy, the command."""

import gzip
import json
import struct
import sysconfig
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripts

from nested_jax import UserError
from nested_jax.models.language_model import init_weights

FOLDER = "continual"


@pytest.fixture
def data(tmp_path):
    """A folder of 10 x 300 images that their first rows tell apart, intents of three words, and three texts."""
    draw = np.random.default_rng(0)
    for part, n in (("train", 300), ("t10k", 100)):
        labels = draw.permutation(np.repeat(np.arange(10), n)).astype(np.uint8)
        images = draw.integers(0, 60, (len(labels), 28 * 28)).astype(np.uint8)
        images[np.arange(len(labels))[:, None], 10 * labels[:, None].astype(int) + np.arange(10)] = 255
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + images.tobytes()))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels.tobytes()))
    rows = lambda n, classes, more="": [(f"word{c} and{more} x{i}", f"class{c}") for i in range(n) for c in range(classes)]
    parts = {"train": rows(4, 20), "val": rows(2, 20, " also"), "test": rows(2, 20, " then")}
    (tmp_path / "clinc150.json").write_text(json.dumps(parts))
    for part, n in (("train", 12), ("test", 3)):
        lines = "\n".join(f'"{text}, please",{name}' for text, name in rows(n, 14))
        (tmp_path / f"banking77_{part}.csv").write_text(f"text,category\n{lines}\n")
    (tmp_path / "languages").mkdir()
    for name in "abc":
        (tmp_path / "languages" / f"{name}.txt").write_text(f"{name} word of {name * 3}. " * 8000)
    return tmp_path


def test_tasks_have_classes_of_their_own_or_pixels_of_their_own(load, data):
    families = load("families")
    key = jax.random.key(0)
    split = families.load("split images", data, 20)
    assert split.train.shape == (10, 20, 784) and split.heldout.shape == split.test.shape == (10, 100, 784)
    sees = [families.draw(split, key, jnp.asarray(task), split.train) for task in range(5)]
    assert [sorted(set(y.tolist())) for _, y in sees] == [[2 * task, 2 * task + 1] for task in range(5)]
    marks = [{int(x[:100].argmax()) // 10 for x in x} for x, _ in sees]  # the class of an image is where it is brightest
    assert sorted(set().union(*marks)) == [*range(10)] and all(len(each) == 2 for each in marks)
    test_x, test_y = families.draw(split, key, jnp.asarray(3), split.test)
    of = dict(zip(sees[3][1].tolist(), (int(x[:100].argmax()) // 10 for x in sees[3][0]), strict=True))
    assert all(of[int(y)] == int(x[:100].argmax()) // 10 for x, y in zip(test_x, test_y, strict=True))
    permuted = families.load("permuted images", data, 20)
    (x, y), (again, _), (other, _) = (families.draw(permuted, key, jnp.asarray(t), permuted.train) for t in (0, 0, 1))
    assert sorted(set(y.tolist())) == [*range(10)] and (x == again).all() and not (x == other).all()
    np.testing.assert_array_equal(np.sort(x, axis=1), np.sort(other, axis=1))


@pytest.mark.parametrize("name, classes, tasks", [("intents", 20, 10), ("banking intents", 14, 7), ("languages", 3, 3)])
def test_other_families_are_read_without_what_is_held_out(load, data, name, classes, tasks):
    family = load("families").load(name, data, 3)
    assert len(family.train) == classes and family.tasks == tasks and family.texts == (name == "languages")
    rows = lambda part: {row.tobytes() for row in part.reshape(-1, part.shape[-1])}
    if not family.texts:
        assert not rows(family.train) & rows(family.heldout)
        np.testing.assert_allclose((family.train**2).sum(-1), family.train.shape[-1], rtol=1e-5)
    assert family.train.shape[1] <= 3


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: (data / "clinc150.json").write_text("{}"), "clinc150.json cannot be read"),
        (lambda data: (data / "train-images-idx3-ubyte.gz").write_bytes(b"no"), "train-images-idx3-ubyte.gz cannot be read"),
        (lambda data: (data / "banking77_test.csv").unlink(), "banking77_*.csv cannot be read"),
        (lambda data: (data / "languages" / "b.txt").write_text("short"), "b.txt has 5 bytes"),
    ],
)
def test_damaged_data_is_said_in_one_line(load, data, damage, message):
    damage(data)
    with pytest.raises(UserError, match=".") as error:
        for name in load("config").FAMILIES[:-1]:
            load("families").load(name, data, 3)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_memories_are_those_of_numpy(load, data):
    """A delta rule example by example, and the least squares of all that was read, on the same features."""
    families, memories, methods = load("families"), load("memories"), load("methods")
    memories.FEATURES, memories.CHUNK = 16, 8
    family = families.load("split images", data, 8)
    seed, judge = jnp.asarray(3), jnp.asarray(family.test)
    key, order, start = jax.random.split(jax.random.key(seed), 3)
    project = np.asarray(jax.random.normal(start, (784, 16)) * 784**-0.5)

    def features(task, part):
        x, y = families.draw(family, key, jnp.asarray(task), jnp.asarray(part))
        k = np.asarray(jax.nn.gelu(np.asarray(x) @ project), float)
        return k / np.linalg.norm(k, axis=1, keepdims=True), np.asarray(y)

    def right(W):
        return [np.mean((k @ W.T).argmax(1) == y) for k, y in (features(task, family.test) for task in range(5))]

    delta, both, own, found = np.zeros((10, 16)), np.zeros((10, 16)), np.zeros((16, 16)), {"delta": [], "squares": []}
    for task in range(5):
        k, y = features(task, family.train)
        for row in np.asarray(jax.random.permutation(jax.random.fold_in(order, task), 16)):
            delta -= 0.4 * np.outer(delta @ k[row] - np.eye(10)[y[row]], k[row])
        both, own = both + np.eye(10)[y].T @ k, own + k.T @ k
        found["delta"].append(right(delta))
        found["squares"].append(right(np.linalg.solve(own + 0.1 * np.eye(16), both.T).T))
    for kind, expected in found.items():
        method = methods.Method(None, (0.4,), (0.1,), kind=kind)
        scores = memories.scores(family, method, judge, seed, jnp.asarray(0.4), jnp.asarray(0.1))
        np.testing.assert_allclose(scores[1:], expected, atol=0.011)  # a label in a hundred may be a tie


def test_attention_sees_what_has_been_read_alone(load, data):
    families, memories, methods = load("families"), load("memories"), load("methods")
    memories.FEATURES = 64
    family = families.load("split images", data, 20)
    method, number = methods.METHODS["attention over all"], jnp.asarray
    scores = memories.scores(family, method, number(family.test), number(0), number(1.0), number(50.0))
    assert (np.triu(scores[1:], 1) == 0).all() and (np.diag(scores[1:]) > 0.5).all()


def one(load, data, name, cells, family="split images", examples=20):
    families, learn, methods = load("families"), load("learn"), load("methods")
    return learn.scores(families.load(family, data, examples), 16, 8, methods.METHODS[name], cells, False)


def test_what_holds_a_method_is_what_its_strength_says(load, data):
    """EWC of strength 0 is fine-tuning, a large one keeps the first task and learns no other."""
    cell = {"rate": 1e-2, "strength": 0.0, "seed": 0}
    (plain,) = one(load, data, "fine-tuning", [cell], examples=200)
    free, held = one(load, data, "EWC", [cell, cell | {"strength": 1e8}], examples=200)
    np.testing.assert_allclose(free, plain, atol=0.011)
    assert plain[1, 0] > 0.8 and plain[-1, -1] > 0.8
    assert held[-1, 0] > 0.8 and held[-1, -1] < 0.3


def test_ewc_weighs_by_fisher_information(load, data):
    """Mean squared gradients of single examples, added up over tasks, around the weights after the last one."""
    learn, models, methods = load("learn"), load("models"), load("methods")
    family = load("families").load("split images", data, 20)
    model = models.model(family, 8, 8)
    params = model.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(learn.FISHER, family.train.shape[-1])), jnp.float32)
    y = jnp.asarray(rng.integers(10, size=learn.FISHER))
    old = jax.tree.map(jnp.ones_like, params)
    kept = learn.Kept(old, old, jnp.zeros(()), jnp.zeros((), jnp.int32))
    found = learn._keep(model, methods.METHODS["EWC"], params, kept, x, y, 1, np.arange(learn.FISHER), 0)
    gradient = jax.jit(jax.grad(lambda params, i: model.nats(params, x[i][None], y[i][None])[0]))
    each = [gradient(params, i) for i in range(learn.FISHER)]
    expected = jax.tree.map(lambda one, *g: one + np.mean(np.square(g), 0), old, *each)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), found.importance, expected)
    assert found.weights is params


def test_replay_forgets_less_than_fine_tuning(load, data):
    cell = {"rate": 3e-3, "strength": 0.0, "seed": 0}
    kinds = ("fine-tuning", "replay of 200")
    (plain,), (replayed,) = (one(load, data, name, [cell], "permuted images", 60) for name in kinds)
    assert replayed[-1, 0] > plain[-1, 0] + 0.1


def test_runs_side_by_side_are_runs_of_their_own(load, data):
    cells = [{"rate": 1e-3, "strength": 0.0, "seed": seed} for seed in (0, 1)]
    together, alone = one(load, data, "CMS, 4 frequencies", cells), one(load, data, "CMS, 4 frequencies", cells[1:])
    np.testing.assert_allclose(together[1], alone[0], atol=0.011)
    assert not np.allclose(*together)


@pytest.mark.parametrize("name", ["M3", "CMS frozen", "continuum optimizer", "EWC"])
def test_texts_are_learned_by_every_optimizer(load, data, name):
    """Bits per byte of the first text fall while it is read."""
    (scores,) = one(load, data, name, [{"rate": 3e-3, "strength": 1.0, "seed": 0}], "languages", 24)
    assert np.isfinite(scores).all() and scores[1].mean() > scores[0].mean() + 0.3


def test_every_method_has_as_many_tries(load):
    methods = load("methods").METHODS
    assert {len(one.rates) * len(one.strengths) for one in methods.values()} == {9}


def test_frozen_levels_stay_and_periods_hold(load, data):
    """A frozen CMS does not move; a level of period 16 moves at the sixteenth update."""
    methods, models, families = load("methods"), load("models"), load("families")
    family = families.load("split images", data, 20)
    model = models.model(family, 8, 8)
    params = model.init(jax.random.key(0))
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = methods.frozen(0.1).update(ones, methods.frozen(0.1).init(params), params)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(updates["cms"])) and jnp.all(updates["head"] < 0)
    rule = methods.cms(2, 0.1)
    state, moved = rule.init(params), []
    for _ in range(16):
        updates, state = rule.update(ones, state, params)
        moved.append([bool(jnp.any(updates["cms"][f"level{i + 1}"]["up"])) for i in range(4)])
    assert moved == [[False, False, True, True]] * 15 + [[True] * 4]


def test_the_command_goes_on_and_reports(load, data, tmp_path, monkeypatch):
    """Nine tries and a seed of each method, once; the same command makes nothing again; a folder that is none is refused."""
    run = load("run")
    monkeypatch.setattr(run, "RESULTS", tmp_path / "continual" / "results")
    (tmp_path / "continual").mkdir()
    flags = ["--families", "split images", "--methods", "fine-tuning", "delta memory", "--seeds", "0", "--examples", "20"]
    flags = ["run.py", "--data", str(data), *flags, "--width", "8", "--hidden", "8", "--lanes", "9"]
    monkeypatch.setattr("sys.argv", flags)
    scripts.in_this_process(monkeypatch, load("record"))
    run.main()
    path = tmp_path / "continual" / "results" / "continual.json"
    results = json.loads(path.read_text())
    assert (
        len(results["runs"]) == 2 * (9 + 1) and len(run.on_seeds(results, family="split images", method="delta memory")) == 1
    )
    for name in ("fine-tuning", "delta memory"):
        tries = [row for row in results["runs"] if row["method"] == name and row["seed"] == 100]
        most = max(tries, key=lambda row: np.mean(row["scores"][-1]))
        assert run.best(results, family="split images", method=name) == {key: most[key] for key in ("rate", "strength")}
    monkeypatch.setattr(run, "run", lambda *_, **__: pytest.fail("a finished run was made again"))
    run.main()
    assert json.loads(path.read_text()) == results and "| delta memory |" in path.with_suffix(".md").read_text()
    monkeypatch.setattr("sys.argv", ["run.py", "--data", "no-folder"])
    with pytest.raises(UserError, match="--data no-folder is no folder: give the one that holds the data"):
        run.main()


def test_languages_lose_what_is_english_in_them(load, tmp_path):
    texts = load("texts")
    for name, page in {"en-US": "<p>Hello</p><p>OK</p>", "de": "<p>Hallo</p><p>OK</p><p>Hallo</p>"}.items():
        folder = tmp_path / "packages" / "x" / "libreoffice" / "help" / name / "text"
        folder.mkdir(parents=True)
        (folder / "page.html").write_text(page)
    texts.write(tmp_path / "packages", tmp_path / "texts")
    assert (tmp_path / "texts" / "de.txt").read_text() == "Hallo\n"
    assert (tmp_path / "texts" / "en-US.txt").read_text() == "Hello\nOK\n"
    with pytest.raises(UserError, match="no unpacked libreoffice-help-en-us"):
        texts.write(tmp_path / "texts", tmp_path / "other")


def test_models_that_read_on_are_of_one_size(load):
    """Within 4 % of the parameters; the levels that learn are as many as the periods."""
    reading = load("reading")
    drawn = lambda config: jax.eval_shape(lambda: init_weights(config, jax.random.key(0)))
    models = {name: reading.model_of(method, 64) for name, method in reading.METHODS.items()}
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(drawn(model))) for name, model in models.items()}
    assert max(sizes.values()) / min(sizes.values()) < 1.04, sizes
    for name, method in reading.METHODS.items():
        assert models[name].cms.periods == (method.periods or ())


def test_languages_are_read_one_after_another(load, data):
    """Bits per byte before and after each, of a learner and of a Transformer that is trained on."""
    reading = load("reading")
    reading.HELD = 1024
    config = reading.Config(data=str(data), first="b", steps=2, read=1024, width=8, seeds=(0,))
    names = ("Hope, 1 levels", "Transformer, trained on")
    cells = [{"method": name, "rate": rate, "seed": 0} for name, rate in zip(names, (0.0, 0.03), strict=True)]
    learner, trained = reading.run(config, cells)
    assert learner["order"] == trained["order"] and learner["order"][0] == "b"
    for row in (learner, trained):
        scores = np.array(row["scores"])
        assert scores.shape == (3, 3) and np.isfinite(scores).all()
        assert scores[1, 1] > scores[0, 1] + 0.05  # it has learned of the language that it met
    results = {"config": {"seeds": [0], "tuning_seed": 100, "methods": [names[0]]}}
    assert f"| {names[0]} | learned |" in reading.table(results | {"runs": [cells[0] | learner]})


def test_domains_are_written_from_packages(load, tmp_path):
    """Prose and manuals as they are, scripture without notes from blocks, code of this Python; all of them cut."""
    domains = load("domains")
    for name, data in {
        "share/anarchism/markdown/a.md.gz": gzip.compress(b"An essay."),
        "share/python3.11/html/_sources/library/a.rst.txt": b"A page.",
    }.items():
        (tmp_path / "packages" / name).parent.mkdir(parents=True)
        (tmp_path / "packages" / name).write_bytes(data)
    with pytest.raises(UserError, match="has no text of scripture: see the first lines of domains.py"):
        domains.write(tmp_path / "packages", tmp_path / "domains", 100)
    books = tmp_path / "packages/share/texts/ztext/kjv"
    books.mkdir(parents=True)
    for name, verse in (("ot", "In the beginning<note>or, x</note> God"), ("nt", "The <w>book</w> of")):
        block = zlib.compress(verse.encode())
        (books / f"{name}.bzz").write_bytes(b"..." + block)
        (books / f"{name}.bzs").write_bytes(struct.pack("<III", 3, len(block), len(verse)))
    domains.write(tmp_path / "packages", tmp_path / "domains", 100)
    text = {file.stem: file.read_text() for file in (tmp_path / "domains").iterdir()}
    assert text.pop("code") == Path(sysconfig.get_path("stdlib"), "__future__.py").read_text()[:100]
    assert text == {"prose": "An essay.", "manuals": "A page.", "scripture": "In the beginning God\n\nThe book of"}
