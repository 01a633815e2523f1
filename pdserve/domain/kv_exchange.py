"""Which workers can exchange KV."""

from pdserve.domain.messages import HandoffHello, WorkerHello

Hello = HandoffHello | WorkerHello


def exchange_obstacle(decode: Hello, prefill: Hello) -> str | None:
    """Why KV cannot go from the prefill worker to the decode worker; None if it can.

    They must speak one protocol, serve one model and hold the same of each token. Their blocks may
    be of any two sizes and orders, and their ranks may divide them in any two ways. Two workers of
    an older version compare their layouts when they meet.
    """
    if decode.protocol_version != prefill.protocol_version:
        return _differ("protocol version", decode.protocol_version, prefill.protocol_version)
    if decode.model_hash != prefill.model_hash:
        return _differ("model", decode.model_hash.hex(), prefill.model_hash.hex())
    ours, theirs = decode.layout, prefill.layout
    if ours is None or theirs is None:
        return None if ours is theirs else "one of them is too old to describe its KV"
    if ours.whole.dtype != theirs.whole.dtype:
        return _differ("KV dtype", ours.whole.dtype, theirs.whole.dtype)
    if not ours.whole.is_same_kv(theirs.whole):
        return "their layers differ in number, KV heads or head sizes"
    return None


def _differ(what: str, decode: object, prefill: object) -> str:
    return f"{what}: {decode} at the decode worker, {prefill} at the prefill worker"
