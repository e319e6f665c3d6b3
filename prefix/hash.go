// SPDX-License-Identifier: Apache-2.0

package prefix

import (
	"encoding/binary"
	"math"

	"github.com/cespare/xxhash/v2"

	"github.com/baton-epp/baton/inference"
)

// tokenBytes is how many raw bytes make a pseudo-token, and how many bytes a token id becomes (llm-d's estimate).
const tokenBytes = 4

// Estimated tokens of a media item (llm-d's defaults: 640×360 pixels, 1,024 pixels to a token; a video of 10 s at two
// frames a second, two of them merged into one). Audio counts its data, four bytes to a token.
const (
	imageTokens = 640 * 360 / 1024
	videoTokens = 10 * imageTokens
)

// A prompt is remembered in pieces whose size grows with their depth: single blocks for the first 64, then 4 at a time
// up to block 512, then 16. A match is then exact to a sixteenth of its length, and a prompt of 100,000 tokens is 244
// entries instead of 1,563.
const (
	fine   = 64                     // blocks that are pieces of their own
	middle = 512                    // blocks from which on pieces have 16
	coarse = (middle-fine)/4 + fine // pieces up to there
)

// blocksIn is the number of blocks in the first n pieces.
func blocksIn(n int) int {
	switch {
	case n <= fine:
		return n
	case n <= coarse:
		return fine + (n-fine)*4
	default:
		return middle + (n-coarse)*16
	}
}

// piecesIn is how many whole pieces the first n blocks have.
func piecesIn(n int) int {
	switch {
	case n <= fine:
		return n
	case n <= middle:
		return fine + (n-fine)/4
	default:
		return coarse + (n-middle)/16
	}
}

// class says how large piece i is: 0, 1 or 2 for 1, 4 or 16 blocks.
func class(i int) uint64 {
	switch {
	case i < fine:
		return 0
	case i < coarse:
		return 1
	default:
		return 2
	}
}

// The low byte of a key names its shard, the two bits above it its class; the rest is hash.
const (
	shardMask  = shardCount - 1
	classShift = 8
	classMask  = 3 << classShift
)

// weight is the number of blocks that a key stands for.
func weight(key uint64) int64 { return 1 << (2 * (key & classMask >> classShift)) }

// Keys are the chain hashes of one prompt. [Index.Hash] fills it; it is meant to be reused.
type Keys struct {
	// Hashes has one chain hash per piece, the partial last one included; each depends on everything before it, on the
	// model and on the cache salt.
	Hashes []uint64
	// Blocks is the number of blocks hashed, the partial last one included.
	Blocks int
	// Tokens is the estimated length of the prompt, media included.
	Tokens int
}

// Hash computes the chain hashes of req's prompt, walking its spans across the chunks of the body without copying.
// Several prompts in one request make one chain.
func (x *Index) Hash(req *inference.Request, k *Keys) {
	h := hasher{block: x.blockTokens * tokenBytes, keys: k.Hashes[:0], left: math.MaxInt}
	if o := x.limits.Load(); o.MaxTokens > 0 {
		h.left = max(1, o.MaxTokens/x.blockTokens) * h.block
	}
	limit := h.left
	h.size = h.block
	h.seed(req.Model, req.CacheSalt)
	k.Tokens = req.PromptTokens()

	cur := cursor{chunks: req.Body.Chunks}
	media := req.Media
	for _, span := range req.Text {
		for len(media) > 0 && media[0].Span.Start < span.Start {
			k.Tokens += h.media(&cur, media[0])
			media = media[1:]
		}
		if req.TokenIDs > 0 {
			h.tokenIDs(&cur, span)
		} else {
			h.text(&cur, span)
		}
	}
	for _, m := range media {
		k.Tokens += h.media(&cur, m)
	}
	if h.filled > 0 {
		h.flush()
	}
	k.Hashes, k.Blocks = h.keys, (limit-h.left+h.block-1)/h.block
}

// hasher cuts a stream of bytes into pieces and chains their hashes.
type hasher struct {
	block int // bytes in a block
	left  int // bytes until the limit
	keys  []uint64

	size   int           // bytes in the current piece
	digest xxhash.Digest // of a piece that does not lie in one chunk
	filled int           // bytes of the current piece in digest
	parent uint64
	run    uint64 // shard of the current run of pieces
}

func (h *hasher) seed(model, salt string) {
	h.digest.Reset()
	_, _ = h.digest.WriteString(model)
	_, _ = h.digest.WriteString(salt)
	h.parent = h.digest.Sum64()
	h.digest.Reset()
}

func (h *hasher) full() bool { return h.left == 0 }

// write adds p to the stream, as far as the limit allows.
func (h *hasher) write(p []byte) {
	p = p[:min(len(p), h.left)]
	h.left -= len(p)
	for len(p) > 0 {
		if h.filled == 0 && len(p) >= h.size {
			size := h.size
			h.emit(xxhash.Sum64(p[:size]))
			p = p[size:]
			continue
		}
		n := min(h.size-h.filled, len(p))
		_, _ = h.digest.Write(p[:n])
		h.filled += n
		p = p[n:]
		if h.filled == h.size {
			h.flush()
		}
	}
}

func (h *hasher) flush() {
	h.emit(h.digest.Sum64())
	h.digest.Reset()
	h.filled = 0
}

// emit chains the hash of one piece. The shard of a key is that of the first piece of its run.
func (h *hasher) emit(sum uint64) {
	var pair [16]byte
	binary.LittleEndian.PutUint64(pair[:], sum)
	binary.LittleEndian.PutUint64(pair[8:], h.parent)
	h.parent = xxhash.Sum64(pair[:])
	i := len(h.keys)
	if i%runPieces == 0 {
		h.run = h.parent & shardMask
	}
	h.keys = append(h.keys, h.parent&^(shardMask|classMask)|class(i)<<classShift|h.run)
	h.size = h.block << (2 * class(i+1))
}

// text adds the raw bytes of span.
func (h *hasher) text(cur *cursor, span inference.Span) {
	for span.Len() > 0 && !h.full() {
		h.write(cur.piece(&span))
	}
}

// tokenIDs adds the numbers of a JSON array, each as four bytes, little-endian.
func (h *hasher) tokenIDs(cur *cursor, span inference.Span) {
	var buf [256]byte
	n := 0
	var id uint32
	inside := false
	put := func() {
		binary.LittleEndian.PutUint32(buf[n:], id)
		if n += tokenBytes; n == len(buf) {
			h.write(buf[:])
			n = 0
		}
		id, inside = 0, false
	}
	for span.Len() > 0 && !h.full() {
		for _, c := range cur.piece(&span) {
			switch {
			case c >= '0' && c <= '9':
				id, inside = id*10+uint32(c-'0'), true
			case inside:
				put()
			}
		}
	}
	if inside {
		put()
	}
	h.write(buf[:n])
}

// media adds the item's hash once per estimated token and returns that number. Items start at a token's border.
func (h *hasher) media(cur *cursor, m inference.Media) int {
	tokens := mediaTokens(m)
	if h.full() {
		return tokens
	}
	var d xxhash.Digest
	d.Reset()
	for span := m.Span; span.Len() > 0; {
		_, _ = d.Write(cur.piece(&span))
	}
	var buf [256]byte
	if odd := h.filled % tokenBytes; odd != 0 {
		h.write(buf[:tokenBytes-odd])
	}
	for i := 0; i < len(buf); i += tokenBytes {
		binary.LittleEndian.PutUint32(buf[i:], uint32(d.Sum64())) //nolint:gosec // the low 32 bits are what is wanted
	}
	for left := tokens * tokenBytes; left > 0 && !h.full(); left -= len(buf) {
		h.write(buf[:min(left, len(buf))])
	}
	return tokens
}

func mediaTokens(m inference.Media) int {
	switch m.Kind {
	case "video_url":
		return videoTokens
	case "input_audio", "audio_url":
		return max(1, (m.Span.Len()+tokenBytes-1)/tokenBytes)
	default:
		return imageTokens
	}
}

// cursor finds the chunk that holds an offset; spans mostly come in ascending order.
type cursor struct {
	chunks [][]byte
	i      int // current chunk
	base   int // offset of its first byte
}

// piece returns the longest contiguous beginning of span and advances span past it; span ends early when the body does.
func (c *cursor) piece(span *inference.Span) []byte {
	if span.Start < c.base {
		c.i, c.base = 0, 0
	}
	for c.i < len(c.chunks) && span.Start >= c.base+len(c.chunks[c.i]) {
		c.base += len(c.chunks[c.i])
		c.i++
	}
	if c.i == len(c.chunks) {
		span.Start = span.End
		return nil
	}
	chunk := c.chunks[c.i]
	p := chunk[span.Start-c.base : min(span.End-c.base, len(chunk))]
	span.Start += len(p)
	return p
}
