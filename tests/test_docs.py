"""The README's picture and tables and the gallery are those of the code, and what they link to exists."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from matplotlib.mathtext import MathTextParser

from docs import cost, figure, gallery, speed, tables
from docs.words import DECAYS, FEATURES, MEANING, READS, UPDATES, meaning
from reference import printed, recurrence
from reference.lsm import LSM
from reference.presets import PRESETS
from reference.printed import PRINTED
from reference.routers import ROUTER
from reference.span import KIND, TRANSITION, transition

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
has_readme = pytest.mark.skipif(not README.exists(), reason="there is no README.md")


SHOWN = {name: row for name, row in LSM.items() if name not in PRINTED}


def marked(*names, body=""):
    return (
        "# Title\n\n" + "\nbetween\n".join(f"<!-- begin: {n} -->\n{body}<!-- end: {n} -->" for n in names) + "\nend\n"
    )


@pytest.fixture
def readme(tmp_path):
    file = tmp_path / "README.md"
    file.write_text(marked(*tables.TABLES, body="what stood here\n"))
    assert tables.main([str(file)]) == 0
    return file


def rows(text, name):
    """The cells of each line of a table of the text, its head and rule left out."""
    block = re.search(f"<!-- begin: {name} -->\n(.*)<!-- end: {name} -->", text, re.DOTALL)[1]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()[2:]]


# ------------------------------------------------------------------------------------------------------ tables


def test_tables_are_written_once_and_leave_the_rest(readme):
    text = readme.read_text()
    assert "what stood here" not in text
    assert text.count("\nbetween\n") == len(tables.TABLES) - 1
    assert text.startswith("# Title\n\n<!--")
    assert text.endswith("-->\nend\n")
    assert tables.main([str(readme)]) == 0
    assert tables.main([str(readme), "--check"]) == 0
    assert readme.read_text() == text


def test_check_sees_one_changed_character_and_changes_nothing(readme, capsys):
    wrong = readme.read_text().replace("| `gla` |", "| `glu` |")
    readme.write_text(wrong)
    assert tables.main([str(readme), "--check"]) == 1
    assert readme.read_text() == wrong
    assert capsys.readouterr().err.count("\n") == 1
    assert tables.main([str(readme)]) == 0
    assert tables.main([str(readme), "--check"]) == 0


@pytest.mark.parametrize(
    "text, message",
    [
        (marked("nonsense"), "there is no table 'nonsense'"),
        ("<!-- begin: models -->\n", "pairs"),
        (marked("models").replace("begin: models", "begin: routers"), "pairs"),
    ],
)
def test_wrong_markers_are_refused_in_one_line(tmp_path, capsys, text, message):
    file = tmp_path / "README.md"
    file.write_text(text)
    assert tables.main([str(file)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert file.read_text() == text


def test_a_missing_file_is_one_line(tmp_path, capsys):
    assert tables.main([str(tmp_path / "none.md"), "--check"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_tables_hold_every_row(readme):
    text = readme.read_text()
    found = rows(text, "models")
    assert [line[1] for line in found] == [f"`{name}`" for name in SHOWN]
    for line, row in zip(found, SHOWN.values(), strict=True):
        assert line[0] == f"[{row.title}](https://arxiv.org/abs/{row.paper})"
        assert line[2:5] == [f"`{word.__name__}`" for word in row[:3]]
        assert line[5] == (transition(row) or "not affine")
    found = rows(text, "routers")
    assert [line[1] for line in found] == [f"`{name}`" for name in ROUTER]
    for line, row in zip(found, ROUTER.values(), strict=True):
        source = row.paper if row.paper.startswith("https://") else f"https://arxiv.org/abs/{row.paper}"
        assert line[0] == f"[{row.title}]({source})"
        assert line[2:4] == ["yes" if flag else "no" for flag in (row.causal(), row.prefix_stable())]
    assert [line[0] for line in rows(text, "presets")] == [f"`{name}`" for name in PRESETS]
    for folder in ("reference", "reference/mixers", "docs"):
        for file in (ROOT / folder).glob("[a-z]*.py"):
            assert re.search(rf"^ *{file.name} ", text, re.MULTILINE), file


def test_the_state_of_a_layer_is_what_the_papers_say():
    """At width 1024 with 8 heads; and beside it the cache of 128K tokens."""
    assert tables.layer_bytes("gla") == 8 * 64 * 128 * 4
    assert tables.layer_bytes("linear_attention_normalized") == 8 * 128 * (128 + 1) * 4
    assert tables.layer_bytes("delta_net") == 8 * 128 * 128 * 4 + 3 * 3 * 1024 * 2  # three taps of q, k and v
    assert tables.cache_bytes() == 512 * 2**20


def test_links_lead_to_the_rows_and_their_layers(readme):
    for name, table in (("models", SHOWN), ("routers", ROUTER)):
        for line, key in zip(rows(readme.read_text(), name), table, strict=True):
            (row, *layer) = LINK.findall(line[-1])
            assert linked_line(row[1]).startswith(f'    "{key}": ')
            if table is SHOWN:
                file, kind = LSM[key].mixer.split(":")
                assert layer[0][1].startswith(f"reference/mixers/{file}.py#L")
                assert linked_line(layer[0][1]).startswith(f"class {kind}(")


def linked_line(target):
    file, number = target.split("#L")
    return (ROOT / file).read_text().splitlines()[int(number) - 1]


def test_a_pipe_or_a_missing_row_cannot_slip_through():
    with pytest.raises(ValueError, match="no line of"):
        tables.line_of("reference/lsm.py", "^no such row")
    for name in ("models", "routers", "losses", "presets"):
        lines = tables.TABLES[name]().splitlines()
        assert len({line.count("|") for line in lines}) == 1, f"{name}: a cell holds a |"


@has_readme
def test_the_readme_is_up_to_date():
    assert tables.main([str(README), "--check"]) == 0


@has_readme
def test_what_the_readme_links_to_exists():
    text = README.read_text()
    targets = [target for _, target in LINK.findall(text)] + re.findall(r'(?:src|href)="([^"]+)"', text)
    anchors = {anchor(title) for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        file, _, place = target.partition("#")
        assert not file or (ROOT / file).exists(), target
        assert file or place in anchors, target
        if re.fullmatch(r"L\d+", place):
            assert linked_line(target).strip(), target


def anchor(title):
    """The name that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


# ------------------------------------------------------------------------------------------------------ picture


def texts(svg):
    """What an SVG by matplotlib says, text by text: letters are drawn as paths, and named in comments."""
    return re.findall(r"<!-- (.*?) -->", svg, re.DOTALL)


def test_the_picture_is_that_of_the_table(tmp_path):
    svg, png = figure.write(tmp_path / "one")
    again = figure.write(tmp_path / "two")
    assert [file.read_bytes() for file in (svg, png)] == [file.read_bytes() for file in again]
    drawn = texts(svg.read_text())
    words = {word.__name__ for row in SHOWN.values() for word in row[:3]}
    assert words <= {text.split("  ")[0] for text in drawn}
    assert {meaning(word.__name__).group for row in SHOWN.values() for word in row[:2]} <= set(drawn)
    assert texts((ROOT / "docs" / "grid.svg").read_text()) == drawn, "run python docs/figure.py"


def test_every_model_stands_in_its_cell():
    placed = figure.cells(room=130)
    assert sum(map(len, placed.values())) == len(SHOWN)
    for row in SHOWN.values():
        chips = placed[meaning(row.decay.__name__).group, meaning(row.update.__name__).group]
        (chip,) = [chip for chip in chips if chip.title == row.title]
        assert "".join(chip.lines).replace(" ", "") == row.title.replace(" ", "")
        assert chip.kind == transition(row)
        words = [word.__name__ for word in row[:3] if word is not recurrence.inclusive]
        assert " ".join(chip.words).split(", ") == words


def test_words_and_rows_to_come_have_a_place(monkeypatch, tmp_path):
    def halve(M, x):
        return M / 2

    monkeypatch.setitem(KIND, halve, "scalar")
    for i in range(4):
        row = LSM["rwkv6"]._replace(title=f"A model with quite a long name {i}", decay=halve)
        monkeypatch.setitem(LSM, f"new{i}", row)
    page = figure.draw()
    inside = page.get_window_extent()
    for text in page.axes[0].texts:
        box = text.get_window_extent()
        assert inside.x0 <= box.x0 <= box.x1 <= inside.x1, text.get_text()
        assert inside.y0 <= box.y0 <= box.y1 <= inside.y1, text.get_text()
    assert [text.get_text() for text in page.axes[0].texts].count("halve") == 1


def test_no_two_texts_overlap():
    texts = figure.draw().axes[0].texts
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    for i, (one, a) in enumerate(boxes):
        for two, b in boxes[:i]:
            assert not a.overlaps(b), (one, two)


def test_every_chip_holds_its_text_and_every_class_has_a_colour():
    chips = [chip for cell in figure.cells(room=120).values() for chip in cell]
    assert {chip.kind for chip in chips} <= figure.CLASS.keys()
    assert set(TRANSITION) | {None} == figure.CLASS.keys()
    for chip in chips:
        assert all(figure.size(line, 12.5) <= 120 for line in chip.lines), chip
        assert all(figure.size(line, 10.5) <= 120 for line in chip.words), chip


# ------------------------------------------------------------------------------------------------------ words


def words_of(*arguments):
    """The functions of the words' files that take these."""
    return {
        name
        for module in (recurrence, printed)
        for name, f in vars(module).items()
        if inspect.isfunction(f)
        and f.__module__ == module.__name__
        and [*inspect.signature(f).parameters] == [*arguments]
    }


def test_every_word_has_its_formula():
    assert words_of("M", "x") == DECAYS.keys()
    assert words_of("M", "before", "x") == UPDATES.keys() | READS.keys()
    assert {row.features.__name__ for row in LSM.values() if row.features} == FEATURES.keys()
    assert len(MEANING) == len(DECAYS) + len(UPDATES) + len(READS) + len(FEATURES)
    parse = MathTextParser("path").parse
    for name, word in MEANING.items():
        assert word.formula and word.about, name
        assert "|" not in word.formula + word.about + word.second, f"{name}: a cell of a table would end here"
        for formula in filter(None, (word.formula, word.second)):
            parse(f"${formula}$")


# ------------------------------------------------------------------------------------------------------ gallery


def test_the_gallery_is_up_to_date(capsys, monkeypatch, tmp_path):
    assert gallery.main(["--check"]) == 0
    monkeypatch.setattr(gallery, "FILE", tmp_path / "gallery.md")
    (tmp_path / "gallery.md").write_text("another")
    assert gallery.main(["--check"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "gallery.md").read_text() == "another"


def test_the_gallery_holds_every_row_and_its_links_lead_somewhere():
    text = gallery.page()
    titles = re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert titles == [row.title for row in LSM.values()]
    anchors = {anchor(title) for title in titles}
    assert len(anchors) == len(titles)
    for _, target in LINK.findall(text):
        file, _, place = target.partition("#")
        if target.startswith("#"):
            assert place in anchors, target
        elif not target.startswith("https:"):
            assert linked_line(target.removeprefix("../")).strip() if place else (ROOT / "docs" / file).exists(), target
    for name, row in LSM.items():
        section = text.split(f"\n### {row.title}\n")[1].split("\n### ")[0]
        assert f"- `{name}`, [{row.paper}]" in section
        assert f"- used in: {row.used or '–'}\n" in section
        assert all(f"`{word.__name__}`: " in section for word in row[:3])
    assert len({line.count("|") for line in gallery.overview().splitlines()}) == 1
    assert text.count("$`") == text.count("`$") and "$$" not in text


@pytest.mark.parametrize(
    "name, lines",
    [
        ("kda", [("M_t", r"D M_{t-1} + \beta k' (v - k D M_{t-1})"), ("o_t", "q M_t")]),
        ("rwkv6", [("M_t", r"D M_{t-1} + k' v"), ("o_t", r"q (M_{t-1} + (u \odot k)' v)")]),
        (
            "titans",
            [
                ("N_t", r"e^{f_t} N_{t-1} + 2 \beta k' (v - k M_{t-1})"),
                ("M_t", "e^{g_t} M_{t-1} + N_t"),
                ("o_t", r"q \, \mathrm{Re} \, M_t"),
            ],
        ),
        (
            "rebased_printed",
            [
                ("M_t", r"M_{t-1} + \varphi(k)' v"),
                ("o_t", r"\varphi(q) M_t"),
                (r"\varphi(q) \varphi(k)'", "(q k')^2 / d"),
            ],
        ),
    ],
)
def test_equations_are_composed_of_the_words(name, lines):
    long = {"D ": r"\mathrm{diag}(e^{g_t}) \, ", "'": r"^{\mathrm{T}}"}
    for short, formula in long.items():
        lines = [tuple(side.replace(short, formula) for side in line) for line in lines]
    assert gallery.equations(LSM[name]) == lines


def test_a_word_without_a_formula_is_its_name():
    def new_word(M, before, x):
        return M

    row = LSM["gla"]._replace(update=new_word)
    assert gallery.equations(row)[0] == ("M_t", r"\mathrm{new word}(\mathrm{diag}(e^{g_t}) \, M_{t-1})")


# ------------------------------------------------------------------------------------------------------ costs


def test_operations_by_hand():
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    L = torch.eye(4, dtype=torch.float64)

    def count(run):
        with cost.Operations() as counter:
            run()
        return counter.total

    assert count(lambda: a @ b) == 2 * 3 * 4 * 5
    assert count(lambda: a.exp() + a) == 24
    assert count(lambda: a.sum(0)) == 12
    assert count(lambda: a.T.contiguous()[:2].clone()) == 0
    assert count(lambda: torch.linalg.solve_triangular(L, b.double(), upper=False)) == 4 * 4 * 5
    assert count(lambda: torch.linalg.solve(L, b[:, 0].double())) == 2 * 64 // 3 + 2 * 16
    x = a.clone().requires_grad_()
    assert count(lambda: torch.autograd.grad((x @ b).sum(), x)) == 2 * 60 + 15 + 2 * 60


def test_layers_cost_what_their_formulas_say():
    """8 heads of 128 x 128: a product of k and v, an addition, a query; and a delta rule looks once more."""
    read, memory = 2 * 128 * 128, 128 * 128
    assert cost.layer("linear_attention").decoding == 8 * (2 * memory + read)
    assert cost.layer("delta_net").decoding == 8 * (2 * memory + 2 * read + 2 * 128)
    products = 2 * read + 2 * 2 * 64 * 128  # reads and writes of the memory, scores of 64 tokens; twice more backward
    assert 1 <= cost.layer("linear_attention").training / (8 * 3 * products) < 1.02
    assert cost.layer("gla").bytes == tables.layer_bytes("gla")
    assert cost.layer("linear_attention").parameters == 5 * 1024 * 1024 + 128


# ------------------------------------------------------------------------------------------------------ speeds


def test_speeds_are_drawn_from_what_was_recorded(tmp_path):
    for file in speed.write(tmp_path):
        assert file.read_bytes()[:4] == b"\x89PNG" and file.stat().st_size < 150_000
        assert (ROOT / "docs" / file.name).stat().st_size < 150_000
    lines = speed.recorded()
    for ax, machine in zip(speed.lengths(lines).axes, speed.machines(lines), strict=True):
        assert ax.get_title().startswith(machine)
        for line in ax.get_lines():  # every point is a line of that machine
            times = {x["graph_ms"] for x in lines if x["machine"] == machine and x["what"] == speed.BOTH}
            assert set(line.get_ydata()) <= times
    bars = speed.floors(lines).axes[0].patches
    assert {round(bar.get_width(), 6) for bar in bars} <= {round(100 / x["graph_over_floor"], 6) for x in lines}


def test_curves_mix_no_runs_and_stars_mark_old_kernels():
    def line(length, ms, row="gla", **more):
        shape = next(s for s, t in speed.LENGTHS.items() if t == length)
        given = {"side": "ours", "what": speed.BOTH, "machine": "A", "triton": "1", "kernels_sha256": "x"}
        return {"row": row, "shape": shape, "graph_ms": ms, "graph_over_floor": 2.0, **given, **more}

    old = [line(t, float(t), kernels_sha256=speed.REWRITTEN[0]) for t in (16384, 2048)]
    found = speed.curves([*old, line(2048, 1.0)])
    assert {name: [x["graph_ms"] for x in points] for name, points in found.items()} == {"gla*": [2048.0, 16384.0]}
    assert list(speed.shares([*old, line(2048, 1.0)])) == ["gla"]  # the newest
    new = speed.curves([*old, line(2048, 1.0), line(16384, 2.0)])
    assert {name: [x["graph_ms"] for x in points] for name, points in new.items()} == {"gla": [1.0, 2.0]}
