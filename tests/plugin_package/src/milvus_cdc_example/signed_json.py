"""A row as a JSON object, signed: a header carries the HMAC of the value."""

import hashlib
import hmac
import json

from milvus_cdc.errors import UserError
from milvus_cdc.format import Record
from milvus_cdc.rows import ChangeOp


class SignedJson:
    CONFIG_SCHEMA = {
        "type": "object",
        "properties": {
            "key": {"type": "string", "secret": True},
            "digest": {"enum": ["sha256", "sha512"]},
        },
        "required": ["key"],
        "additionalProperties": False,
    }
    content_type = "application/json"

    def __init__(self, config):
        if len(config["key"]) < 16:
            raise UserError("KEY_TOO_SHORT", "a key has at least 16 characters", field="key")
        self.key = config["key"].encode()
        self.digest = getattr(hashlib, config.get("digest", "sha256"))

    async def prepare(self, table, topic="", schema_topic=""):
        pass

    def encode(self, table, changes):
        if changes.op is ChangeOp.DELETE:
            return [Record(to_json(key), None) for key in changes.arrow(table)[0].to_pylist()]
        rows = changes.rows(table)
        return [self.signed(to_json(row[table.key.name]), to_json(row)) for row in rows]

    def encode_schema(self, change, table):
        what = "CREATE_COLLECTION" if change is None else change.kind.value
        return self.signed(to_json(table.full_name), to_json({"event": what}))

    def signed(self, key, value):
        signature = hmac.new(self.key, value, self.digest).hexdigest()
        return Record(key, value, (("signature", signature.encode()),))

    async def close(self):
        pass


def to_json(value):
    return json.dumps(value, default=bytes.hex).encode()
