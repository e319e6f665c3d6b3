// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"crypto/sha256"
	"encoding/binary"
	"slices"
)

// blockHash is vLLM's hash of a block and all before it: SHA-256 of the canonical CBOR of [parent, [token …], extra].
type blockHash [sha256.Size]byte

// defaultHashSeed is what vLLM 0.32 takes where PYTHONHASHSEED is not set.
const defaultHashSeed = "vllm-none-hash"

// Major types of CBOR (RFC 8949), and its null.
const (
	cborUint     = 0 << 5
	cborNegative = 1 << 5
	cborBytes    = 2 << 5
	cborText     = 3 << 5
	cborArray    = 4 << 5
	cborNull     = 0xf6
)

func rootHash(seed string) blockHash {
	orDefault(&seed, defaultHashSeed)
	return sha256.Sum256(cborString(nil, seed))
}

// extraKeys are what tells blocks of equal tokens apart.
type extraKeys struct {
	lora  string
	id    int // of the adapter, from 1; 0 for none
	salt  string
	media []mediaItem
}

// extraKey is one of a block's: tag and values enter its hash, the values but path its event.
type extraKey struct {
	tag, value, path string
	offset           int // of a media item to its block's first token; it has no tag
}

// addExtraKeys says what enters the block hashes of g beside its tokens, where they are told.
func (p *process) addExtraKeys(c *call, g *group) {
	if p.events == nil {
		return
	}
	extra := &extraKeys{lora: c.lora, id: slices.Index(p.e.opts.LoRAs, c.lora) + 1, salt: c.cacheSalt, media: c.media}
	for _, q := range g.seqs {
		q.extra = extra
	}
}

// of are the keys of the block at, in vLLM's order.
func (x *extraKeys) of(at, size int) (keys []extraKey) {
	if x.lora != "" {
		keys = append(keys, extraKey{tag: "lora", value: x.lora, path: loraPath(x.lora)})
	}
	for _, m := range x.media {
		if from := at * size; m.offset < from+size && from < m.offset+mediaTokens {
			keys = append(keys, extraKey{value: m.key, offset: m.offset - from})
		}
	}
	if x.salt != "" && at == 0 {
		keys = append(keys, extraKey{tag: "cache_salt", value: x.salt})
	}
	return keys
}

// loraPath is where an adapter lies on the server.
func loraPath(name string) string { return "lora/" + name }

// hash is the hash of q's full block at.
func (q *sequence) hash(v *kvEvents, at int) blockHash {
	for len(q.hashes) <= at {
		n, parent := len(q.hashes), v.root
		if n > 0 {
			parent = q.hashes[n-1]
		}
		q.hashes = append(q.hashes, hashBlock(parent, q.tokens[n*v.size:(n+1)*v.size], q.extra.of(n, v.size)))
	}
	return q.hashes[at]
}

func hashBlock(parent blockHash, tokens []uint32, extra []extraKey) blockHash {
	b := make([]byte, 0, 64+5*len(tokens))
	b = cborHead(b, cborArray, 3)
	b = append(cborHead(b, cborBytes, len(parent)), parent[:]...)
	b = cborHead(b, cborArray, len(tokens))
	for _, t := range tokens {
		b = cborHead(b, cborUint, int(t))
	}
	if len(extra) == 0 {
		return sha256.Sum256(append(b, cborNull))
	}
	b = cborHead(b, cborArray, len(extra))
	for _, k := range extra {
		b = k.cbor(b)
	}
	return sha256.Sum256(b)
}

func (k extraKey) cbor(b []byte) []byte {
	switch {
	case k.tag == "" && k.offset < 0:
		return cborHead(cborString(cborHead(b, cborArray, 2), k.value), cborNegative, -1-k.offset)
	case k.tag == "":
		return cborHead(cborString(cborHead(b, cborArray, 2), k.value), cborUint, k.offset)
	case k.path == "":
		return cborString(cborString(cborHead(b, cborArray, 2), k.tag), k.value)
	}
	return cborString(cborString(cborString(cborHead(b, cborArray, 3), k.tag), k.value), k.path)
}

func cborString(b []byte, s string) []byte { return append(cborHead(b, cborText, len(s)), s...) }

// cborHead appends a major type with the shortest form of its number, as canonical CBOR demands. n is below 2^32.
func cborHead(b []byte, major byte, n int) []byte {
	switch {
	case n < 24:
		return append(b, major|byte(n)) //nolint:gosec // below 24
	case n < 1<<8:
		return append(b, major|24, byte(n))
	case n < 1<<16:
		return binary.BigEndian.AppendUint16(append(b, major|25), uint16(n))
	}
	return binary.BigEndian.AppendUint32(append(b, major|26), uint32(n)) //nolint:gosec // token ids and short lengths
}
