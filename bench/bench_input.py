"""The whole input path of training, beside a loader that works clip by clip: what a model that costs nothing would wait for.

A turn is a few batches of the epoch's keyed order, the next ones at each turn; log-mel and targets are made and dropped.
Ours starts from the packed samples. Beside it: the same with the reference backends; the same without a pack, where each
clip is decoded from its file at every visit, one batch ahead and on as many threads as torch has; and a torch DataLoader whose
worker processes do for each clip what AST's loader does (PAPER_NOTES 2). Its workers live on between turns.

Speech Commands under bench.run's --data-root; without one, words that train/data/synth.py makes, written as WAV.
Files are read again and again, so they come from the system's cache of the disk.
"""

import contextlib
import os
import shutil
import tempfile
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bench.bench_fbank import kaldi
from bench.measure import CACHE_BYTES, Case, worst
from fftp.augment import Augment, AugmentSettings
from fftp.errors import UserError
from fftp.frontend import PRESETS, FrontEnd
from kernels import dispatch
from train import data
from train.data.clips import DataSet
from train.data.decode import Task, decode
from train.data.pack import Pack, pack
from train.feed import Feed, Order
from train.samples import Clips, Resident, to_device
from train.settings import Settings

FRONT_END = PRESETS["fftp-speechcommands"]
RATE = FRONT_END.fbank.sample_rate
AUGMENT = AugmentSettings(
    augment="specmask", roll=True, noise=True
)  # the paper's for Speech Commands, AST's roll and noise
SEED = 0
BATCH = 128  # AST's egs/speechcommands
BATCHES = 4  # a turn
ROUNDS = 5
WORKERS = 2
MADE = 400  # words, where no recordings are given
CHECKED = 16  # clips
# Mean difference of the loader's cells from ours: 4e-7 on files of 16 bits; 2e-3 on Opus, which the loader does not round to
# 16 bits, times five. Another clip's cells are 0.28 away, the same clip's one frame later 0.08.
LOADER_AWAY = 1e-2


def cases(device: str, data_root: str | None = None):
    """One row. data_root: a folder in Speech Commands' layout.

    Raises UserError where it is none, and for fewer training recordings than are checked.
    """
    words = Words(data_root)
    clips = words.pack.indices("train")
    if len(clips) < CHECKED:
        raise UserError(f"{data_root} has {len(clips)} training recordings: give at least {CHECKED}.")
    B = min(BATCH, len(clips) // BATCHES)
    feed = Feed(Resident(words.pack, torch.device(device)), clips, FrontEnd(FRONT_END))
    unpacked = Feed(Files(words, torch.device(device)), clips, FrontEnd(FRONT_END)) if words.in_files else None
    peers = {
        "from the pack, references": lambda sets: _epoch(feed, B, fused=False),
        "not packed, --fused": lambda sets: _epoch(words.needed(unpacked), B, fused=True),
        f"DataLoader as AST's, {WORKERS} workers": lambda sets: _loader(words, feed, B, device),
    }
    yield Case(
        part="input",
        case={"data": words.name, "files": words.form, "clips": len(clips), "B": B, "batches": BATCHES},
        backend="from the pack, --fused",
        ours=lambda sets: _epoch(feed, B, fused=True),
        peers=peers,
        correct=lambda: _correct(words, feed, unpacked),
        set_bytes=CACHE_BYTES,  # each call takes other clips by itself: no further input sets
        clips=B * BATCHES,
        rounds=ROUNDS,
        figures=words.packing,
        eager=("ours", *peers),
    )


class Words:
    """Recordings and their pack, whose making is timed: `packing` holds clips a second, on all cores.

    Without soundfile, which writes and reads files, made words stay in memory, and whatever needs files is left out.
    """

    def __init__(self, data_root: str | None):
        self.room = Path(tempfile.mkdtemp(prefix="fftp-bench-"))
        weakref.finalize(self, shutil.rmtree, self.room, ignore_errors=True)
        self.packing = {}
        if data_root is None:
            self.name, self.form = "made words", "wav"
            self.clips = self._made()
        else:
            self.clips = data.load(Settings(data="speechcommands", data_root=data_root))
            self.name, self.form = Path(data_root).resolve().name, self.clips.clips[0].source.suffix[1:]
        self.in_files = isinstance(self.clips.clips[0].source, Path)
        self.pack = self._packed()

    def _made(self) -> DataSet:
        made = data.load(Settings(data="synth", seed=SEED, synth_train=MADE, synth_validation=10, synth_test=10))
        try:
            import soundfile
        except ImportError:
            return made
        clips = []
        for clip in made.clips:
            path = self.room / "words" / f"{clip.name}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, clip.source, RATE, subtype="PCM_16")
            clips.append(replace(clip, source=path))
        return replace(made, clips=tuple(clips))

    def _packed(self) -> Pack:
        """Into a cache of its own, so that it is made and not found."""
        given = os.environ.get("FFTP_CACHE")
        os.environ["FFTP_CACHE"] = str(self.room / "cache")
        try:
            started = time.perf_counter()
            made = pack(self.clips, RATE, progress=False)
            seconds = time.perf_counter() - started
        finally:
            os.environ.pop("FFTP_CACHE") if given is None else os.environ.update(FFTP_CACHE=given)
        if self.in_files:
            self.packing["packing_clips_per_second"] = len(self.clips.clips) / seconds
        return made

    def needed(self, what):
        """`what`, or the reason why it cannot be: a ValueError."""
        if not self.in_files:
            raise ValueError("there are no files to read: soundfile, which writes them, is not installed")
        return what


class Files:
    """In place of a pack: a batch's clips decoded from their files when they are asked for, each once."""

    def __init__(self, words: Words, device: torch.device):
        self.pack, self.device, self._clips = words.pack, device, words.clips.clips
        self._threads = ThreadPoolExecutor(torch.get_num_threads())

    def clips(self, numbers: np.ndarray, W: int) -> Clips:
        """Clips by their numbers in the pack, int64 `[B]` on the host, cut to W samples."""
        once, which = np.unique(numbers, return_inverse=True)
        found = [clip[:W] for clip in self._threads.map(self._decoded, once)]
        length = np.array([len(clip) for clip in found])
        start = np.cumsum(length) - length
        host = (np.concatenate(found), start[which], length[which], self.pack.labels[numbers])
        return Clips(*(to_device(torch.from_numpy(array), self.device) for array in host))

    def arrived(self, clips: Clips) -> Clips:
        return clips

    def _decoded(self, number):
        clip = self._clips[number]
        return decode(Task(clip.source, clip.name, 0), RATE, FRONT_END.fbank.frame)


def _epoch(feed, B, fused):
    augment = Augment(AUGMENT, SEED, FRONT_END.T, FRONT_END.F)
    turns = _turns(feed, B)

    def run(i):
        dispatch.use_fused(fused)
        for _ in feed.training(next(turns), 0, augment):
            pass

    return run


def _turns(feed, B):
    """The steps of each turn, through the epoch and from its start again."""
    steps = Order(feed, B, SEED, balanced=False).epoch(0)
    return cycle([steps[i : i + BATCHES] for i in range(0, len(steps) - BATCHES + 1, BATCHES)])


def _loader(words, feed, B, device):
    """Batches by worker processes. They are started anew, not forked: this process runs torch's threads."""
    clips = words.needed(words.clips.clips)
    dataset = ClipByClip([(str(clips[i].source), words.pack.labels[i]) for i in feed.indices])
    with _as_many_workers_as_ast():
        loader = DataLoader(
            dataset, batch_sampler=_Positions(_turns(feed, B)), num_workers=WORKERS, persistent_workers=True,
            pin_memory=device == "cuda", multiprocessing_context="spawn",
        )  # fmt: skip

    def run(i):
        with _as_many_workers_as_ast():
            batches = iter(loader)
        for log_mel, targets in batches:
            log_mel.to(device, non_blocking=True), targets.to(device, non_blocking=True)

    return run


@contextlib.contextmanager
def _as_many_workers_as_ast():
    """PyTorch warns where they are more than cores, when a loader is made and when its workers start."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")
        yield


class _Positions:
    """A sampler of batches: at each turn the next one's."""

    def __init__(self, turns):
        self._turns = turns

    def __iter__(self):
        for positions, _ in next(self._turns):
            yield positions.tolist()


class ClipByClip(Dataset):
    """What AST's loader does for a clip of Speech Commands, by soundfile, torchaudio and numpy (PAPER_NOTES 2.1 to 2.5).

    files: (path, labels float32 `[C]`) of each clip. augmented: masks, noise and roll, as in training.
    """

    def __init__(self, files: list[tuple[str, np.ndarray]], augmented: bool = True):
        self.files, self.augmented = files, augmented

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised log-mel `[T, F]`, labels `[C]`."""
        import soundfile
        from torchaudio.transforms import FrequencyMasking, TimeMasking

        path, labels = self.files[i]
        wave = torch.from_numpy(soundfile.read(path, dtype="float32", always_2d=True)[0].T)  # (channels, W)
        log_mel = _padded(kaldi(wave - wave.mean()))
        if self.augmented:
            masked = FrequencyMasking(AUGMENT.mask_max_frequency)(log_mel.T[None])
            log_mel = TimeMasking(AUGMENT.mask_max_time)(masked)[0].T
        log_mel = (log_mel - FRONT_END.mean) / (2 * FRONT_END.std)
        if self.augmented:
            log_mel = log_mel + torch.rand(log_mel.shape) * np.random.rand() / 10
            log_mel = log_mel.roll(np.random.randint(-10, 10), 0)
        return log_mel, torch.from_numpy(labels)


def _padded(log_mel):
    """Followed by zeros, or cut: `[T, F]`."""
    return torch.nn.functional.pad(log_mel[: FRONT_END.T], (0, 0, 0, max(0, FRONT_END.T - len(log_mel))))


def _correct(words, feed, unpacked):
    """Without augmentation: ours by `bench_fbank`'s rule, the same bits from files, the loader's but for rounding."""
    dispatch.use_fused(True)
    positions = np.arange(CHECKED) * (len(feed) // CHECKED)
    waves = [_wave(feed.pack, i) for i in feed.indices[positions]]
    exact = torch.stack([_padded(kaldi((wave - wave.mean())[None])) for wave in waves])
    plain = torch.stack([_padded(kaldi((wave - wave.mean()).float()[None])) for wave in waves])
    allowed = 2 * worst(plain, exact) + 1e-4
    log_mel = feed.raw(positions)[0]
    right = worst(log_mel.cpu(), exact) <= allowed
    if words.in_files:
        right &= torch.equal(unpacked.raw(positions)[0], log_mel)
        files = [(str(words.clips.clips[i].source), feed.pack.labels[i]) for i in feed.indices[positions]]
        loader = ClipByClip(files, augmented=False)
        loaded = torch.stack([loader[i][0] for i in range(CHECKED)])
        right &= float((loaded - feed.plain(positions).log_mel.cpu()).abs().mean()) <= LOADER_AWAY
    return right


def _wave(made, i):
    """Clip i of a pack, cut to a training clip: float64 `[W]` in -1..1."""
    samples = made.samples[made.start[i] : made.start[i] + min(made.length[i], FRONT_END.clip_samples)]
    return torch.from_numpy(samples.astype(np.float64) / 32768)
