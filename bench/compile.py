"""python -m bench.compile [--json FILE] [--markdown FILE] [--arch ...] [--kernel ...] [--first]: compile kernels ahead of time.

Needs no GPU: Triton brings its assembler. Every shipped configuration is compiled for each architecture, and the
machine code is read back: registers, shared memory, spills (loads and stores of local memory), matrix instructions.
Exit code 1 when one spills, takes more shared memory than a block of that GPU may have (the compiler does not
complain), or is a product that sm_90 would run without its warp-group instructions. --first: one configuration a kernel.
docs/COMPILED.md is what --markdown writes.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ARCHITECTURES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448}  # bytes a block may ask for (CUDA guide, table 30)
MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC[A-Z0-9]*MMA"}
MEL_BINS = 128
FRAMES = 1000  # of a clip, in the paper's FFTP runs on AudioSet
SCAN_STATES, SCAN_TAPS = 16, 4  # of every AuM
# Of AuM-base: z is half of a projection's output, B and C are parts of another's.
SCAN_SIZES = {"E": 1536, "S": SCAN_STATES, "stride_u": 1536, "stride_delta": 1536, "stride_z": 3072}
SCAN_SIZES |= {"stride_B": 80, "stride_C": 80}
WIDTHS = (768, 384, 192)  # of its sizes
GRIDS = {"(128, 10)/4": (10, 128, 4, 128), "(128, 50)/10": (50, 128, 10, 128), "(16, 16)/10": (16, 16, 10, 10)}
_DIVISIBLE = [["tt.divisibility", 16]]  # what a launch promises by itself for pointers and multiples of 16


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel in one configuration.

    types: argument -> "*bf16", "i32", ... in Triton's spelling; the kernel's other arguments are constants.
    divisible: integer arguments that a launch of this case has as multiples of 16; pointers always are.
    product: it is a matrix product, so that it has to reach the matrix units.
    tile: what the architecture decides, in words.
    """

    kernel: str
    config: str
    function: object
    types: dict[str, str]
    constants: dict[str, object]
    divisible: tuple[str, ...] = ()
    options: dict[str, int] = field(default_factory=dict)
    product: bool = False
    tile: str = ""


def cases(arch: str) -> Iterator[Case]:
    """The shipped configurations for an architecture; the first of each kernel is the one that `--first` takes."""
    yield from _patch_embed_cases(arch)
    yield _philox_case()
    yield from _spec_mask_cases()
    yield from _waveform_cases()
    yield from _fbank_cases()
    yield from _norm_cases()
    yield from _gelu_cases()
    yield from _selective_scan_cases(arch)
    yield from _chunked_scan_cases(arch)


def _patch_embed_cases(arch):
    import torch

    from kernels.patch_embed import kernel

    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    for dtype, out in (("bf16", "bf16"), ("bf16", "fp32"), ("fp16", "fp16"), ("fp32", "fp32")):
        for grid, (pt, pf, st, sf) in GRIDS.items():
            N = ((FRAMES - pt) // st + 1) * ((MEL_BINS - pf) // sf + 1)
            parts = kernel.forward_parts(pt * pf, N)
            common = {"K": pt * pf, "F": MEL_BINS, "PF": pf, "ST": st, "SF": sf, "UPCAST": False}
            common["PRECISION"] = kernel.precision(names[dtype])
            for operation, masked, boxes in _forms(arch, pf):
                at = kernel.tile(kernel.operation(operation, masked, MEL_BINS, pf), arch, names[dtype])
                function = getattr(kernel, f"_{operation}_kernel")
                bins = kernel.bins_of_tile(at, MEL_BINS, pf)
                special = {
                    "forward": {"POSITION": True, "TOKENS": True, "BOXES": boxes, "PARTS": parts}
                    | {"TILE_M": at.m, "TILE_D": at.n, "TILE_K": at.k},
                    "weight": {"TILE_D": at.m, "TILE_K": at.n, "TILE_R": at.k},
                    "log_mel": {"TILE_M": at.m, "TILE_F": bins, "TILE_D": at.k},
                }[operation]
                types = dict.fromkeys(_pointers(function), f"*{out}")
                types |= {"partial_ptr": "*fp32"} if operation == "weight" else {}
                types |= {"out_ptr": "*fp32"} if operation == "forward" and parts > 1 else {}
                types |= {"out_ptr": f"*{dtype}"} if operation == "log_mel" else {}
                types |= {"log_mel_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", "fill_ptr": f"*{dtype}"}
                if boxes:
                    types["log_mel_ptr"] = f"tensordesc<{dtype}[{at.m}, {at.k}]>"
                    types["weight_ptr"] = f"tensordesc<{dtype}[{at.n}, {at.k}]>"
                types["bits_ptr"] = "*i64"
                constants = common | special | {"HIDDEN": masked}
                form = "".join((", descriptors" * boxes, ", masked" * masked))
                if operation == "forward" and parts > 1:
                    form += f", {parts} parts"
                yield Case(
                    kernel=f"patch_embed {operation}",
                    config=f"{grid}, {dtype} to {out}{form}",
                    function=function,
                    types=_numbers(function, constants) | types,
                    constants=constants,
                    divisible=("D",),
                    options={"num_warps": at.warps, "num_stages": at.stages},
                    product=True,
                    tile=f"{at.m}x{bins if operation == 'log_mel' else at.n}x{at.k}, {at.warps} warps",
                )
    yield from _small_patch_embed_cases(kernel)


def _forms(arch, pf):
    """(operation, masked, by descriptors): what the backends launch on this architecture for such a patch."""
    for operation in ("forward", "weight", "log_mel"):
        yield operation, False, False
        yield operation, True, False
    if arch != "sm_80" and pf == MEL_BINS:
        yield "forward", False, True


def _small_patch_embed_cases(kernel):
    """What adds up the parts of a sum, and what turns rectangles into bits."""
    function, tile = kernel._join_kernel, f"{kernel.JOINED_ROWS}x{kernel.JOINED_COLUMNS}, {kernel.JOIN_WARPS} warps"
    for out in ("bf16", "fp16", "fp32"):
        constants = {"PARTS": 2, "POSITION": True, "TOKENS": True, "UPCAST": False}
        constants |= {"TILE_M": kernel.JOINED_ROWS, "TILE_D": kernel.JOINED_COLUMNS}
        yield Case(
            kernel="patch_embed join",
            config=f"2 parts to {out}",
            function=function,
            types=_numbers(function, constants)
            | dict.fromkeys(_pointers(function), f"*{out}")
            | {"partial_ptr": "*fp32"},
            constants=constants,
            divisible=("D",),
            options={"num_warps": kernel.JOIN_WARPS},
            tile=tile,
        )
    function = kernel._bits_kernel
    constants = {"WORDS": MEL_BINS // 64, "TILE_T": kernel.FRAMES_OF_BITS, "TILE_W": MEL_BINS // 64}
    yield Case(
        kernel="patch_embed bits",
        config=f"{MEL_BINS} bins",
        function=function,
        types=_numbers(function, constants) | {"rectangles_ptr": "*i32", "bits_ptr": "*i64"},
        constants=constants,
        options={"num_warps": kernel.BITS_WARPS},
        tile=f"{kernel.FRAMES_OF_BITS} frames, {kernel.BITS_WARPS} warps",
    )


def _philox_case():
    from kernels import philox_kernel as kernel

    function, constants = kernel._words_kernel, {"BLOCK": kernel.BLOCK}
    return Case(
        kernel="philox",
        config="words",
        function=function,
        types=_numbers(function, constants) | dict.fromkeys(_pointers(function), "*i64"),
        constants=constants,
        options={"num_warps": kernel.WARPS},
        tile=f"{kernel.BLOCK}, {kernel.WARPS} warps",
    )


def _spec_mask_cases():
    from kernels.spec_mask import kernel

    tile = {"TILE_T": kernel.TILE_T, "TILE_F": kernel.TILE_F}
    options = {"num_warps": kernel.WARPS}
    size = f"{kernel.TILE_T}x{kernel.TILE_F}, {kernel.WARPS} warps"
    for name, function, flags in (
        ("spec_mask", kernel._spec_mask_kernel, {"CLIP": (False, True), "LANES": (128,)}),
        ("spec_augment", kernel._spec_augment_kernel, {}),
    ):
        for clip in flags.get("CLIP", (None,)):
            for painted in (None, "fp32", "bf16"):
                constants = {"PAINT": painted is not None} | tile
                if clip is not None:
                    constants |= {"CLIP": clip, "LANES": 128}
                pointers = {a: "*i32" if a[:4] in ("rect", "coun", "area") else "*i64" for a in _pointers(function)}
                pointers |= {"log_mel_ptr": f"*{painted or 'i32'}", "fill_ptr": f"*{painted or 'i32'}"}
                yield Case(
                    kernel=name,
                    config=("draw" if painted is None else f"draw and paint {painted}") + (", clip" if clip else ""),
                    function=function,
                    types=_numbers(function, constants) | pointers,
                    constants=constants,
                    options=options,
                    tile=size,
                )
    for dtype in ("fp32", "bf16"):
        function = kernel._paint_kernel
        pointers = {"log_mel_ptr": f"*{dtype}", "rectangles_ptr": "*i32", "fill_ptr": f"*{dtype}"}
        yield Case(
            kernel="paint",
            config=f"paint {dtype}",
            function=function,
            types=_numbers(function, tile) | pointers,
            constants=tile,
            options=options,
            tile=size,
        )


def _addresses(case: Case) -> list[str]:
    """The pointers that this case really hands over: a tensor descriptor is none."""
    return [a for a in _pointers(case.function) if case.types[a].startswith("*")]


def _waveform_cases():
    from kernels.waveform import kernel

    integers = {"samples_ptr": "*i16", "sums_ptr": "*i64"} | dict.fromkeys(
        ("start_ptr", "length_ptr", "other_start_ptr", "other_length_ptr"), "*i64"
    )
    for mixed in (True, False):
        for function, constants in (
            (kernel._sums_kernel, {}),
            (kernel._waveforms_kernel, {"GAIN": True, "BLOCK": kernel.BLOCK_CHUNKS}),
        ):
            constants = constants | {"PARTNER": mixed, "CHUNK": kernel.CHUNK}
            pointers = dict.fromkeys(_pointers(function), "*fp32")
            yield Case(
                kernel="waveforms, sums" if function is kernel._sums_kernel else "waveforms",
                config="mixup" if mixed else "no partner",
                function=function,
                types=_numbers(function, constants) | pointers | {a: integers[a] for a in pointers if a in integers},
                constants=constants,
                options={"num_warps": kernel.WARPS},
            )


def _fbank_cases():
    from kernels.fbank import FbankSettings, kernel

    function = kernel._fbank_kernel
    for name, settings, roll in (
        ("16 kHz", FbankSettings(), True),
        ("8 kHz, 40 mel bins", FbankSettings(sample_rate=8000, n_mels=40), True),
        ("32 kHz", FbankSettings(sample_rate=32000), True),
        ("44.1 kHz", FbankSettings(sample_rate=44100), True),
    ):
        at = kernel.tile(settings.n_fft)
        constants = kernel.constants(settings) | {"ROLL": roll, "TILE_T": at.frames}
        pointers = dict.fromkeys(_pointers(function), "*fp32") | {"length_ptr": "*i64", "roll_ptr": "*i64"}
        yield Case(
            kernel="fbank",
            config=f"{name}, {settings.n_fft} points, {at.frames} frames, {at.warps} warps",
            function=function,
            types=_numbers(function, constants) | pointers | {"preemphasis": "fp32"},
            constants=constants,
            options={"num_warps": at.warps, "num_stages": at.stages},
            # Triton 3.6 gives eight frames to the older matrix instructions; they are few, and the rate is rare.
            product=at.frames >= 16,
        )
    function = kernel._normalise_kernel
    for noise in (True, False):
        constants = {"NOISE": noise, "BLOCK": kernel.CELLS}
        pointers = dict.fromkeys(_pointers(function), "*i64" if noise else "*fp32") | {"log_mel_ptr": "*fp32"}
        yield Case(
            kernel="normalise",
            config="noise" if noise else "no noise",
            function=function,
            types=_numbers(function, constants) | pointers | {"mean": "fp32", "scale": "fp32"},
            constants=constants,
            options={"num_warps": kernel.WARPS, "enable_fp_fusion": False},
        )


def _norm_cases():
    from kernels.norm import kernel

    for operation, centred in (("rms_norm", False), ("layer_norm", True)):
        for function, dtype, width in itertools.product(
            (kernel._forward_kernel, kernel._backward_kernel), ("bf16", "fp16", "fp32"), WIDTHS
        ):
            forward, block = function is kernel._forward_kernel, 1 << (width - 1).bit_length()
            elements, warps = kernel.BLOCK, kernel.WARPS
            if not forward:
                elements, warps = kernel.BACKWARD_BLOCK, kernel.backward_warps(block)
            constants = {"INTERPRETED": False, "BLOCK_R": elements // block, "BLOCK_D": block, "CENTRED": centred}
            constants |= {"ADD": True, "BIAS": centred} if forward else {"NARROW": dtype != "fp32"}
            pointers = dict.fromkeys(_pointers(function), "*fp32")
            pointers |= {a: f"*{dtype}" for a in ("x_ptr", "normed_ptr", "grad_ptr", "d_x_ptr") if a in pointers}
            yield Case(
                kernel=operation if forward else f"{operation} backward",
                config=f"{dtype}, width {width}",
                function=function,
                types=_numbers(function, constants) | pointers | {"eps": "fp32"},
                constants=constants,
                divisible=("D",),
                options={"num_warps": warps},
                tile=f"{constants['BLOCK_R']}x{block}, {warps} warps",
            )


def _gelu_cases():
    from kernels.gelu import kernel

    rows, columns = kernel.BLOCK
    for name, function in (("gelu", kernel._forward_kernel), ("gelu backward", kernel._backward_kernel)):
        for biased, dtype in ((True, "bf16"), (True, "fp16"), (True, "fp32"), (False, "bf16")):
            constants = {"BIAS": biased, "INTERPRETED": False, "BLOCK_R": rows, "BLOCK_D": columns}
            pointers = dict.fromkeys(_pointers(function), f"*{dtype}") | {
                "bias_ptr": "*fp32" if biased else f"*{dtype}"
            }
            pointers |= {"partial_ptr": "*fp32"} if name == "gelu backward" else {}
            yield Case(
                kernel=name,
                config=f"{dtype}{'' if biased else ', no bias'}",
                function=function,
                types=_numbers(function, constants) | pointers,
                constants=constants,
                divisible=("D",),
                options={"num_warps": kernel.WARPS},
                tile=f"{rows}x{columns}, {kernel.WARPS} warps",
            )


def _selective_scan_cases(arch):
    from kernels.selective_scan import backward_kernel, forward_kernel, kernel

    typed = (
        "grad_ptr",
        "u_ptr",
        "delta_ptr",
        "B_ptr",
        "C_ptr",
        "z_ptr",
        "out_ptr",
        "d_u_ptr",
        "d_delta_ptr",
        "d_z_ptr",
    )
    constants = {"REVERSE": False, "CHUNK": kernel.CHUNK, "INTERPRETED": False, "BLOCK_S": SCAN_STATES}
    divisible = ("E", "S", "stride_u", "stride_delta", "stride_B", "stride_C", "stride_z")
    for name, operation, function, kept in (
        ("scan", "scan", forward_kernel._forward_kernel, (True, False)),
        ("scan backward", "scan_backward", backward_kernel._backward_kernel, (None,)),
    ):
        at = kernel.BLOCKS[operation, arch]
        exchange = backward_kernel.over_lanes(SCAN_STATES, at, interpreted=False)
        pointers = dict.fromkeys(_pointers(function), "*fp32")
        for dtype in ("bf16", "fp16", "fp32"):
            for two in (True, False):
                for keep in kept if dtype == "bf16" else kept[:1]:
                    flags = constants | {"TWO": two, "BLOCK_E": at.channels}
                    flags |= {"OVER_LANES": exchange} if keep is None else SCAN_SIZES | {"KEEP": keep}
                    yield Case(
                        kernel=name,
                        config=f"{dtype}, {'both ways' if two else 'one way'}{', no states kept' * (keep is False)}",
                        function=function,
                        types=_numbers(function, flags) | pointers | {a: f"*{dtype}" for a in typed if a in pointers},
                        constants=flags,
                        divisible=[a for a in divisible if a not in flags],
                        options={"num_warps": at.warps},
                    )
    at = kernel.BLOCKS["conv", arch]
    constants = {"K": SCAN_TAPS, "REVERSE": False, "INTERPRETED": False, "BLOCK_T": at.tokens, "BLOCK_E": at.channels}
    for name, function, flags, typed in (
        ("causal_conv", kernel._conv_kernel, {"ADJOINT": False}, ("u_ptr", "out_ptr")),
        ("causal_conv", kernel._conv_kernel, {"ADJOINT": True}, ("out_ptr",)),
        ("causal_conv backward", kernel._conv_backward_kernel, {}, ("grad_ptr", "u_ptr")),
    ):
        for dtype in ("bf16", "fp16", "fp32"):
            pointers = dict.fromkeys(_pointers(function), "*fp32") | dict.fromkeys(typed, f"*{dtype}")
            yield Case(
                kernel=name,
                config=f"{dtype}{', input gradient' * flags.get('ADJOINT', False)}",
                function=function,
                types=_numbers(function, constants | flags) | pointers,
                constants=constants | flags,
                divisible=("E", "stride_u"),
                options={"num_warps": at.warps},
            )


def _chunked_scan_cases(arch):
    from kernels.selective_scan import chunked_kernel, kernel

    at = kernel.BLOCKS["scan", arch]
    ways = {"REVERSE": False, "INTERPRETED": False}
    block = {"CHUNK": chunked_kernel.LONG_CHUNK, "BLOCK_E": at.channels, "BLOCK_S": SCAN_STATES}
    typed = ("u_ptr", "delta_ptr", "B_ptr", "C_ptr", "z_ptr", "out_ptr")
    divisible = ("E", "S", "stride_u", "stride_delta", "stride_B", "stride_C", "stride_z")
    for name, function, flags, warps, dtypes in (
        ("scan of chunks, ends", chunked_kernel._ends_kernel, block, at.warps, ("bf16", "fp16", "fp32")),
        ("scan of chunks", chunked_kernel._outputs_kernel, block, at.warps, ("bf16", "fp16", "fp32")),
        (
            "scan of chunks, carried",
            chunked_kernel._carry_kernel,
            {"BLOCK": chunked_kernel.CARRIED},
            chunked_kernel.CARRY_WARPS,
            ("fp32",),
        ),
    ):
        for dtype in dtypes:
            for two in (True, False):
                constants = ways | flags | {"TWO": two}
                constants |= SCAN_SIZES if function is chunked_kernel._outputs_kernel else {}
                pointers = dict.fromkeys(_pointers(function), "*fp32")
                yield Case(
                    kernel=name,
                    config=f"{dtype}, {'both ways' if two else 'one way'}",
                    function=function,
                    types=_numbers(function, constants) | pointers | {a: f"*{dtype}" for a in typed if a in pointers},
                    constants=constants,
                    divisible=[a for a in divisible if a in function.arg_names and a not in constants],
                    options={"num_warps": warps},
                )


def _pointers(function) -> list[str]:
    return [a for a in function.arg_names if a.endswith("_ptr")]


def _numbers(function, constants) -> dict[str, str]:
    """Every other argument is an int32; the threshold of a probability needs one bit more."""
    names = [a for a in function.arg_names if not a.endswith("_ptr") and a not in constants]
    return {a: "i64" if a == "full_threshold" else "i32" for a in names}


def build(case: Case, arch: str) -> dict:
    """Compile one case and read what came out: a line of the table."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.function.arg_names
    source = ASTSource(
        fn=case.function,
        signature={a: "constexpr" if a in case.constants else case.types[a] for a in names},
        constexprs=case.constants,
        attrs={(names.index(a),): _DIVISIBLE for a in (*_addresses(case), *case.divisible)},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", ARCHITECTURES[arch], 32), options=case.options)
    binaries = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage, code = (
            subprocess.run([binaries / tool, flag, cubin], capture_output=True, text=True, check=True).stdout
            for tool, flag in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    operations = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", code, re.MULTILINE)
    return {
        "kernel": case.kernel,
        "arch": arch,
        "config": case.config,
        "tile": case.tile,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "shared_bytes": compiled.metadata.shared,
        "spills": sum(o.startswith(("LDL", "STL")) for o in operations),
        "matrix_instructions": sum(bool(re.match(MATRIX[arch], o)) for o in operations),
        "instructions": len(operations),
    }


def fault(row: dict, product: bool) -> str:
    """Why this line is not good enough, or nothing."""
    if row["spills"]:
        return f"{row['spills']} spills"
    if row["shared_bytes"] > SHARED_LIMIT[row["arch"]]:
        return f"{row['shared_bytes']} bytes of shared memory, {SHARED_LIMIT[row['arch']]} are allowed"
    if product and not row["matrix_instructions"]:
        return f"no {MATRIX[row['arch']]}"
    return ""


def rendered(rows: list[dict], version: str) -> str:
    """The table as Markdown: a line a configuration, a column an architecture."""
    text = [
        "# The compiled kernels",
        "",
        f"Written by `python -m bench.compile --markdown FILE` with Triton {version}, which brings its assembler; no GPU was",
        "used. A cell: the tile and its warps, then registers / bytes of shared memory / spills / matrix instructions in the",
        "machine code (HMMA on sm_80, HGMMA on sm_90, UTCHMMA on sm_100). A dash: not launched there.",
    ]
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        some = [row for row in rows if row["kernel"] == kernel]
        arches = [arch for arch in ARCHITECTURES if any(row["arch"] == arch for row in rows)]
        text += [
            "",
            f"## {kernel}",
            "",
            "| configuration | " + " | ".join(arches) + " |",
            "| --- " * (len(arches) + 1) + "|",
        ]
        for config in dict.fromkeys(row["config"] for row in some):
            cells = {row["arch"]: _cell(row) for row in some if row["config"] == config}
            text.append(f"| {config} | " + " | ".join(cells.get(arch, "-") for arch in arches) + " |")
    return "\n".join(text) + "\n"


def _cell(row: dict) -> str:
    figures = f"{row['registers']} / {row['shared_bytes']:,} / {row['spills']} / {row['matrix_instructions']}"
    return f"{row['tile']}: {figures}" if row["tile"] else figures


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.compile", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="write the table to this file, a list of objects")
    parser.add_argument("--markdown", type=Path, help="write the table to this file, to be read")
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--kernel", nargs="+", metavar="NAME", help="kernels whose names contain one of these")
    parser.add_argument("--first", action="store_true", help="one configuration of each kernel")
    wanted = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("error: with TRITON_INTERPRET=1 there is nothing to compile: unset it.", file=sys.stderr)
        return 2
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns that the default is about to change
    rows, faults = [], 0
    print(
        f"{'kernel':<20} {'arch':<7} {'config':<54} {'tile':<22} {'regs':>5} {'shared':>7} {'spills':>6} {'matrix':>6}"
    )
    for arch in wanted.arch:
        seen = set()
        for case in cases(arch):
            if wanted.first and case.kernel in seen:
                continue
            if wanted.kernel and not any(name in case.kernel for name in wanted.kernel):
                continue
            seen.add(case.kernel)
            row = build(case, arch)
            why = fault(row, case.product)
            faults += bool(why)
            rows.append(row | {"fault": why})
            print(
                f"{case.kernel:<20} {arch:<7} {case.config:<54} {case.tile:<22} {row['registers']:>5} {row['shared_bytes']:>7} "
                f"{row['spills']:>6} {row['matrix_instructions']:>6}{'  ' + why.upper() if why else ''}",
                flush=True,
            )
    print(f"{len(rows)} compiled, {faults} not good enough")
    if wanted.json:
        wanted.json.write_text(json.dumps(rows, indent=1) + "\n")
    if wanted.markdown:
        import triton

        wanted.markdown.write_text(rendered(rows, triton.__version__))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
