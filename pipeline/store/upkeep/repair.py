"""Repairs a damaged store as far as possible, so that a capture completes it.

Files that other records imply are written again: metadata, receipts, declarations, the index. Other
damaged signals are withdrawn, manifest first, and only their damaged files are removed, so that a
capture computes just these again. Intact files are not touched.
"""

import shutil
from pathlib import Path

from pipeline.provenance import sync_what_is_there, write_bytes_atomically
from pipeline.store.index import ensure_index, read_index, withdraw
from pipeline.store.layout import Layout
from pipeline.store.links import links_below
from pipeline.store.planner import PLANNED_ASSETS
from pipeline.store.sealed import write_record
from pipeline.store.upkeep.findings import ASSETS, INDEX, PLAN, Damage, SignalState


def repair(path: Path, found: list[SignalState]) -> list[str]:
    """Repair or remove what `verify_store` found damaged; return a line for each action.

    Only the holder of the store's lock may call this, who held it during the verification.
    """
    layout, done = Layout(path), _remove_links(Layout(path))
    sections = {state.name: state for state in found}
    is_planless = any(_spoils_plan(layout, d) for d in sections[PLAN].damage)
    is_lost = bool(sections[INDEX].damage) or is_planless
    if is_lost:
        # Rebuilt below, or by a capture, from the remaining manifests.
        _remove(layout, layout.index.name)
        done.append("index: removed, to be rebuilt from the manifests")
    for state in found:
        if state.name not in (INDEX, PLAN, ASSETS) and state.damage:
            done += _repair_signal(layout, state, is_lost=is_lost)
    # A rebuilt index would list a manifest that reappears after a power cut.
    sync_what_is_there([layout.manifests])
    for damage in sections[ASSETS].damage:
        if damage.content is None:
            done += _remove_asset(layout, damage, is_lost=is_lost)
        else:
            _clear(layout, damage.file)
            done.append(_restore(layout, damage))
    done += _repair_rows(layout, sections[PLAN], is_planless=is_planless)
    if is_lost and not is_planless and layout.plan.exists():
        ensure_index(layout)
        done.append("index: rebuilt")
    return done


def _remove_links(layout: Layout) -> list[str]:
    """Remove every link, but not its target: repairs through it would write elsewhere."""
    done = []
    for link in list(links_below(layout.root)):
        link.unlink()
        done.append(f"{_name(layout, link)}: a link, removed")
    return done


def _spoils_plan(layout: Layout, damage: Damage) -> bool:
    """Tell whether the plan must be written anew, and with it the teacher's files that it lists."""
    if damage.is_stray:
        return False
    planned = tuple(f"{layout.assets.name}/{name}/" for name in PLANNED_ASSETS)
    return layout.root / damage.file == layout.plan or damage.file.startswith(planned)


def _repair_signal(layout: Layout, state: SignalState, *, is_lost: bool) -> list[str]:
    name = state.name
    for damage in state.damage:
        _clear(layout, damage.file)
    done = [_restore(layout, d) for d in state.damage if _is_restorable(state, d)]
    rest = [damage for damage in state.damage if not _is_restorable(state, damage)]
    if not rest:
        return done
    if is_lost:
        _remove(layout, _name(layout, layout.manifest(name)))
    else:
        withdraw(layout, name)
    segments = sorted({damage.segment for damage in rest if damage.segment is not None})
    for segment in segments:
        _remove(layout, _name(layout, layout.receipt(name, segment)))
    for damage in rest:
        if damage.segment is None:
            _remove(layout, damage.file)
    what = f" and the receipts of segments {segments}" if segments else ""
    return [*done, f"{name}: manifest{what} removed"]


def _is_restorable(state: SignalState, damage: Damage) -> bool:
    """Tell whether a file can be restored; a receipt is useful only if its shards are intact."""
    others = [d for d in state.damage if d.segment == damage.segment and d.content is None]
    return damage.content is not None and (damage.segment is None or not others)


def _restore(layout: Layout, damage: Damage) -> str:
    path = layout.root / damage.file
    if isinstance(damage.content, dict):
        write_record(path, damage.content)
    else:
        assert damage.content is not None
        write_bytes_atomically(path, damage.content)
    return f"{damage.file}: written again from what other records state"


def _remove_asset(layout: Layout, damage: Damage, *, is_lost: bool) -> list[str]:
    if not is_lost:
        index = read_index(layout)
        gone = [
            name
            for name, entry in index["assets"].items()
            if _name(layout, layout.assets / entry["file"]) == damage.file
        ]
        for name in gone:
            del index["assets"][name]
            write_record(layout.index, index)
            _remove(layout, _name(layout, layout.asset_records / f"{name}.json"))
    _remove(layout, damage.file)
    return [f"{damage.file}: removed"]


def _repair_rows(layout: Layout, state: SignalState, *, is_planless: bool) -> list[str]:
    done = []
    for damage in state.damage:
        if damage.content is not None:
            _clear(layout, damage.file)
            done.append(_restore(layout, damage))
        else:
            _remove(layout, damage.file)
            done.append(f"{damage.file}: removed")
    if is_planless:
        _remove(layout, _name(layout, layout.plan))
        done.append("plan: removed, to be written again with what it lists of the teacher")
    return done


def _name(layout: Layout, path: Path) -> str:
    return path.relative_to(layout.root).as_posix()


def _clear(layout: Layout, name: str) -> None:
    """Remove whatever is in the way of a file or of a directory above it."""
    path = layout.root / name
    for parent in path.parents:
        if parent != layout.root and parent.is_relative_to(layout.root) and parent.exists():
            if not parent.is_dir():
                parent.unlink()
            break
    if path.is_dir():
        shutil.rmtree(path)


def _remove(layout: Layout, name: str) -> None:
    _clear(layout, name)
    (layout.root / name).unlink(missing_ok=True)
