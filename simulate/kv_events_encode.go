// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"encoding/binary"

	"github.com/tinylib/msgp/msgp"
)

// Types of KV events, and where blocks lie.
const (
	eventStored  = "BlockStored"
	eventRemoved = "BlockRemoved"
	eventCleared = "AllBlocksCleared"

	mediumGPU = "GPU" // also on a CPU
	mediumCPU = "CPU"
)

// eventField is a field of an event with its value in msgpack; nil where that is the field's default, null.
type eventField struct {
	name  string
	value []byte
}

// add appends an event to a list, its fields in the order of vLLM's classes: as a map with its type as first key and
// without fields that have their default, or as an array that begins with its type and has them all. msgspec does so.
func (v *kvEvents) add(to *eventList, event string, fields []eventField) {
	array := v.opts.Encoding == encodingArray
	n := uint32(1)
	for _, f := range fields {
		if array || f.value != nil {
			n++
		}
	}
	b := to.encoded
	if array {
		b = msgp.AppendString(msgp.AppendArrayHeader(b, n), event)
	} else {
		b = msgp.AppendString(msgp.AppendString(msgp.AppendMapHeader(b, n), "type"), event)
	}
	for _, f := range fields {
		switch {
		case array && f.value == nil:
			b = msgp.AppendNil(b)
		case array:
			b = append(b, f.value...)
		case f.value != nil:
			b = append(msgp.AppendString(b, f.name), f.value...)
		}
	}
	to.encoded = b
	to.count++
}

// storedFields are those of the blocks of q from one to another.
func (v *kvEvents) storedFields(q *sequence, from, to int) []eventField {
	parent, loraID, loraName := msgp.AppendNil(nil), msgp.AppendNil(nil), msgp.AppendNil(nil)
	if from > 0 {
		parent = v.appendHash(nil, q.hash(v, from-1))
	}
	if q.extra.lora != "" {
		loraID = msgp.AppendUint64(nil, uint64(q.extra.id)) //nolint:gosec // from 1
		loraName = msgp.AppendString(nil, q.extra.lora)
	}
	hashes := make([]blockHash, 0, to-from)
	extra := arrayOf(to - from)
	for at := from; at < to; at++ {
		hashes = append(hashes, q.hash(v, at))
		extra = appendExtra(extra, q.extra.of(at, v.size))
	}
	part := q.tokens[from*v.size : to*v.size]
	tokens := arrayOf(len(part))
	for _, t := range part {
		tokens = msgp.AppendUint64(tokens, uint64(t))
	}
	return v.placeFields(hashes, parent, tokens, loraID, mediumGPU, loraName,
		extra, msgp.AppendUint64(nil, 0), msgp.AppendString(nil, "full_attention"))
}

// parkedFields are those of blocks that the offloading connector stored: it knows hashes only.
func (v *kvEvents) parkedFields(hashes []blockHash) []eventField {
	null := msgp.AppendNil(nil)
	return v.placeFields(hashes, null, arrayOf(0), null, mediumCPU, null, nil, nil, nil)
}

func (v *kvEvents) placeFields(hashes []blockHash, parent, tokens, loraID []byte, medium string, loraName, extra, group, kind []byte) []eventField {
	return []eventField{
		{"block_hashes", v.appendHashes(hashes)},
		{"parent_block_hash", parent},
		{"token_ids", tokens},
		{"block_size", msgp.AppendUint64(nil, uint64(v.size))}, //nolint:gosec // above 0
		{"lora_id", loraID},
		{"medium", msgp.AppendString(nil, medium)},
		{"lora_name", loraName},
		{"extra_keys", extra},
		{"group_idx", group},
		{"kv_cache_spec_kind", kind},
		{"kv_cache_spec_sliding_window", nil},
	}
}

func (v *kvEvents) removedFields(medium string, hashes ...blockHash) []eventField {
	var group []byte
	if medium == mediumGPU {
		group = msgp.AppendUint64(nil, 0)
	}
	return []eventField{{"block_hashes", v.appendHashes(hashes)}, {"medium", msgp.AppendString(nil, medium)}, {"group_idx", group}}
}

func (v *kvEvents) appendHashes(hashes []blockHash) []byte {
	b := arrayOf(len(hashes))
	for _, h := range hashes {
		b = v.appendHash(b, h)
	}
	return b
}

func (v *kvEvents) appendHash(b []byte, h blockHash) []byte {
	if v.opts.HashBytes {
		return msgp.AppendBytes(b, h[:])
	}
	return msgp.AppendUint64(b, binary.BigEndian.Uint64(h[len(h)-8:]))
}

// appendExtra appends a block's extra keys: their values, without what else enters the hash.
func appendExtra(b []byte, keys []extraKey) []byte {
	if len(keys) == 0 {
		return msgp.AppendNil(b)
	}
	b = msgp.AppendArrayHeader(b, uint32(len(keys))) //nolint:gosec // a few
	for _, k := range keys {
		if k.tag != "" {
			b = msgp.AppendString(b, k.value)
			continue
		}
		b = msgp.AppendString(msgp.AppendArrayHeader(b, 2), k.value)
		if k.offset < 0 {
			b = msgp.AppendInt64(b, int64(k.offset))
		} else {
			b = msgp.AppendUint64(b, uint64(k.offset))
		}
	}
	return b
}

func arrayOf(n int) []byte { return msgp.AppendArrayHeader(make([]byte, 0, 8+3*n), uint32(n)) } //nolint:gosec // a slice's length
