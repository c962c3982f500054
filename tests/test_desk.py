"""The rows that attention reads: filled in place, and always what gathering everything anew would give."""

from collections.abc import Sequence

import pytest
import torch
from golden_weights import uniform
from torch import Tensor

from shotstream.memory.plan import Frame, Place, Plan
from shotstream.memory.store import FrameStore, SettledStore

LAYERS, HEIGHT, WIDTH, TOKENS = 2, 2, 3, 6
HEADS, DIM = 2, 12


def fresh_store() -> FrameStore:
    return FrameStore(LAYERS, HEIGHT, WIDTH)


def kv(key: int, frames: int) -> tuple[Tensor, Tensor]:
    return tuple(uniform(key + part, (1, frames * TOKENS, HEADS, DIM)) for part in (1, 2))  # type: ignore[return-value]


def at(frames: Sequence[Frame], shift: float = 0.0) -> tuple[Place, ...]:
    return tuple(Place(frame, frame.index + shift) for frame in frames)


def call(store: FrameStore, past: Sequence[Place], new: Sequence[Place], key: int, write: bool = False) -> list[Tensor]:
    """One call through all layers: everything it read."""
    bound = store.bind(Plan(tuple(new), (*past, *new)), tuple(place.frame for place in new), write)
    read = []
    for layer in range(LAYERS):
        read += [t.clone() for t in bound.extend(layer, *kv(100 * key + 10 * layer, len(new)))]
    return read


def anew(store: FrameStore) -> FrameStore:
    """The same memory with nothing laid out."""
    return store.fork()


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def grown(chunks: int) -> tuple[FrameStore, list[Frame]]:
    """A shot of `chunks` committed chunks of two frames, each denoised in two noisy passes first."""
    store, frames = fresh_store(), list[Frame]()
    for chunk in range(chunks):
        new = [Frame(2 * chunk + i) for i in range(2)]
        for step in range(2):
            call(store, at(frames), at(new), key=10 * chunk + step)
        call(store, at(frames), at(new), key=10 * chunk + 9, write=True)
        frames += new
    return store, frames


NEXT = [Frame(100), Frame(101)]


@pytest.mark.parametrize("chunks", [0, 1, 4])
def test_a_growing_shot_reads_what_a_fresh_layout_reads(chunks):
    store, frames = grown(chunks)
    assert same(call(store, at(frames), at(NEXT), 50), call(anew(store), at(frames), at(NEXT), 50))


CHANGES = {
    "moved": lambda frames: at(frames, shift=2.0),
    "turned": lambda frames: tuple(Place(frame, frame.index, 0.5) for frame in frames),
    "one turned": lambda frames: (*at(frames[:3]), Place(frames[3], frames[3].index, 0.5), *at(frames[4:])),
    "fewer": lambda frames: at(frames[2:]),
    "reordered": lambda frames: at(frames[::-1]),
    "an empty one first": lambda frames: (Place(Frame(0, role="empty"), 0), *at(frames)),
    "a copy": lambda frames: (*at(frames[:2]), Place(Frame(77, source=0), 77)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_between_calls_is_laid_out_again(change):
    store, frames = grown(3)
    past = CHANGES[change](frames)
    ours, theirs = call(store, past, at(NEXT), 50), call(anew(store), past, at(NEXT), 50)
    assert same(ours, theirs)
    unchanged = call(anew(store), at(frames), at(NEXT), 50)
    assert ours[0].shape != unchanged[0].shape or not torch.equal(ours[0], unchanged[0])


def test_a_frame_that_was_forgotten_and_made_anew_is_not_read_as_it_was():
    store, frames = grown(3)
    store.forget(frames[4:])
    call(store, at(frames[:4]), at(frames[4:]), key=77, write=True)
    assert same(call(store, at(frames), at(NEXT), 50), call(anew(store), at(frames), at(NEXT), 50))
    store.retain(frames[:4])
    call(store, at(frames[:4]), at(frames[4:]), key=78, write=True)
    assert same(call(store, at(frames), at(NEXT), 50), call(anew(store), at(frames), at(NEXT), 50))


def test_a_blended_frame_is_read_blended():
    store, frames = grown(2)
    before = call(store, at(frames), at(NEXT), 50)
    store.blend(frames[0], frames[1], 0.25)
    after = call(store, at(frames), at(NEXT), 50)
    assert same(after, call(anew(store), at(frames), at(NEXT), 50)) and not same(before, after)


def test_a_fork_does_not_write_where_the_other_reads():
    store, frames = grown(2)
    branch = store.fork()
    call(branch, at(frames[:2]), at(NEXT), 60, write=True)
    call(branch, at([*frames[:2], *NEXT]), at([Frame(102)]), 61)
    assert same(call(store, at(frames), at(NEXT), 50), call(anew(store), at(frames), at(NEXT), 50))


def test_a_call_that_was_interrupted_leaves_nothing_that_is_read():
    """Its first layer ran, its second did not."""
    store, frames = grown(2)
    bound = store.bind(Plan(at(NEXT), (*at(frames), *at(NEXT))), tuple(NEXT), True)
    bound.extend(0, *kv(900, 2))
    store.forget(NEXT)
    call(store, at(frames), at(NEXT), key=70, write=True)
    assert same(
        call(store, at([*frames, *NEXT]), at([Frame(102)]), 71),
        call(anew(store), at([*frames, *NEXT]), at([Frame(102)]), 71),
    )


def test_rows_that_nobody_wrote_are_never_read():
    store = fresh_store()
    store.room = 12
    call(store, (), at([Frame(0)]), 1)
    for rows in store.desk:
        rows.k.fill_(float("nan"))
        rows.v.fill_(float("nan"))
    frames = [Frame(0), Frame(1)]
    call(store, (), at(frames), 2, write=True)
    read = call(store, at(frames), at(NEXT), 3)
    assert all(t.isfinite().all() for t in read)
    assert store.desk[0].k.shape[1] == 12 * TOKENS and store.desk[0].k[:, 4 * TOKENS :].isnan().all()


def test_with_room_a_growing_shot_moves_nothing():
    """Buffers stay where they are, and each frame is rotated to its place once."""
    store = fresh_store()
    store.room = 8
    call(store, (), at([Frame(0)]), 1)
    where = [rows.k.data_ptr() for rows in store.desk]
    frames: list[Frame] = []
    for chunk in range(3):
        new = [Frame(2 * chunk), Frame(2 * chunk + 1)]
        call(store, at(frames), at(new), chunk, write=True)
        frames += new
        assert all(rows.places == at(frames) for rows in store.desk)
    assert [rows.k.data_ptr() for rows in store.desk] == where


def test_what_learns_gets_tensors_of_its_own():
    """Gradients flow through the call's keys and values, and a later call cannot spoil them."""
    store, frames = grown(2)
    k, v = (t.requires_grad_() for t in kv(500, 2))
    bound = store.bind(Plan(at(NEXT), (*at(frames), *at(NEXT))), tuple(NEXT), False)
    keys, values = bound.extend(0, k, v)
    expected = [t.detach().clone() for t in (keys, values)]
    with torch.no_grad():
        assert same([t.clone() for t in bound.extend(0, k.detach(), v.detach())], expected)
        call(store, at(frames), at(NEXT), 51)
    assert same([keys.detach(), values.detach()], expected)
    (keys.square().sum() + values.square().sum()).backward()
    assert torch.allclose(v.grad, 2 * v) and torch.allclose(k.grad, 2 * k)


# -- one copy, where frames stay at their places


def test_one_copy_is_read_as_two_are():
    """A shot that grows and, with a window, forgets: the same reads, and nothing kept beside the desk."""
    stores = FrameStore(LAYERS, HEIGHT, WIDTH), SettledStore(LAYERS, HEIGHT, WIDTH)
    read: list[list[list[Tensor]]] = [[], []]
    for store, seen in zip(stores, read, strict=True):
        frames: list[Frame] = []
        for chunk in range(5):
            new = [Frame(2 * chunk + i) for i in range(2)]
            seen.append(call(store, at(frames), at(new), key=10 * chunk))
            seen.append(call(store, at(frames), at(new), key=10 * chunk + 9, write=True))
            frames = frames[:1] + (frames + new)[1:][-5:]  # a sink, and the newest
            store.retain(frames)
        seen.append(call(store, at(frames), at(NEXT), key=99))
    assert all(same(*pair) for pair in zip(*read, strict=True))
    assert set(stores[0].kept) == set(stores[1].kept)
    assert not any(stores[1].kept.values())


def test_one_copy_forks_and_survives_an_interrupted_call():
    store, frames = SettledStore(LAYERS, HEIGHT, WIDTH), [Frame(0), Frame(1)]
    call(store, (), at(frames), 1, write=True)
    branch = store.fork()
    bound = store.bind(Plan(at(NEXT), (*at(frames), *at(NEXT))), tuple(NEXT), True)
    bound.extend(0, *kv(900, 2))  # its second layer never ran
    store.forget(NEXT)
    for made, key in ((store, 70), (branch, 80)):
        call(made, at(frames), at(NEXT), key, write=True)
    fresh = FrameStore(LAYERS, HEIGHT, WIDTH)
    call(fresh, (), at(frames), 1, write=True)
    for made, key in ((store, 70), (branch, 80)):
        truth = fresh.fork()
        call(truth, at(frames), at(NEXT), key, write=True)
        last = at([*frames, *NEXT]), at([Frame(102)])
        assert same(call(made, *last, 71), call(truth, *last, 71))


@pytest.mark.parametrize("change", ["moved", "turned", "reordered"])
def test_one_copy_refuses_frames_that_move(change):
    store, frames = SettledStore(LAYERS, HEIGHT, WIDTH), [Frame(i) for i in range(4)]
    call(store, (), at(frames), 1, write=True)
    with pytest.raises(AssertionError, match="not settled"):
        call(store, CHANGES[change](frames), at(NEXT), 50)


def test_one_copy_takes_half_the_memory():
    frames = [Frame(i) for i in range(4)]
    stores = FrameStore(LAYERS, HEIGHT, WIDTH), SettledStore(LAYERS, HEIGHT, WIDTH)
    for store in stores:
        call(store, (), at(frames), 1, write=True)
    on_desk = sum(t.nbytes for rows in stores[0].desk for t in (rows.k, rows.v))
    assert stores[1].bytes == on_desk == stores[0].bytes
