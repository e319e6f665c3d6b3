// SPDX-License-Identifier: Apache-2.0

package inference

import (
	"errors"
	"fmt"
)

// ErrMalformed says that a request body is not one UTF-8 JSON object of its API (HTTP 400).
var ErrMalformed = errors.New("malformed request body")

// maxDepth bounds nesting. Python's own parser stops at about 1,000 levels.
const maxDepth = 512

// A cursor walks over the bytes of a body, whatever its chunks. Errors stick: the first one is kept and the cursor
// stands at the end from then on, where every reading method finds nothing and every loop ends.
type cursor struct {
	chunks [][]byte
	cur    []byte // chunks[chunk]; nil after the last one
	pos    int    // of the next byte in cur
	chunk  int
	base   int // offset of cur[0] in the body
	depth  int
	err    error

	// The first bytes of a UTF-8 sequence that goes on in the next chunk.
	carry   [4]byte
	carried int

	scratch [maxKey]byte // for strings that are escaped or cut by a chunk's border
}

// A token is one JSON value as it was found. Its span is that of a string's contents, or of the whole other value.
type token struct {
	Span
	chunk, at int  // where its first byte lies
	kind      byte // the first byte; '0' for numbers, 'N' for NaN and the infinities, 0 for no token
	escaped   bool // a string that holds backslashes
}

func newCursor(chunks [][]byte) cursor {
	c := cursor{chunks: chunks}
	if len(chunks) > 0 {
		c.cur = chunks[0]
	}
	return c
}

// offset is that of the next byte in the body.
func (c *cursor) offset() int { return c.base + c.pos }

// more goes on to the next chunk that holds bytes.
func (c *cursor) more() bool {
	for c.chunk < len(c.chunks) {
		c.base += len(c.cur)
		c.cur, c.pos = nil, 0
		c.chunk++
		if c.chunk < len(c.chunks) && len(c.chunks[c.chunk]) > 0 {
			c.cur = c.chunks[c.chunk]
			return true
		}
	}
	return false
}

// peek returns the next byte, 0 at the end: no JSON text holds that byte, so it needs no second result.
func (c *cursor) peek() byte {
	for c.pos >= len(c.cur) {
		if !c.more() {
			return 0
		}
	}
	return c.cur[c.pos]
}

// space skips white space and returns the byte after it, 0 at the end.
func (c *cursor) space() byte {
	for {
		b := c.peek()
		if b > ' ' || b != ' ' && b != '\n' && b != '\r' && b != '\t' {
			return b
		}
		c.pos++
	}
}

// fail keeps the first error. Text says what is wrong, without words of the client.
func (c *cursor) fail(text string) { c.failAt(c.offset(), text) }

func (c *cursor) failAt(offset int, text string) {
	if c.err == nil {
		c.err = fmt.Errorf("%w: %s at byte %d", ErrMalformed, text, offset)
	}
	c.cur, c.pos, c.chunk = nil, 0, len(c.chunks)
}

// unexpected fails at a byte that cannot stand here.
func (c *cursor) unexpected(want string) {
	if c.err != nil {
		return
	}
	if b := c.peek(); c.pos < len(c.cur) {
		c.fail(fmt.Sprintf("unexpected byte 0x%02x, want %s", b, want))
		return
	}
	c.fail("the body ends, want " + want)
}

// content returns what the string t says.
func (c *cursor) content(t token) []byte { return content(c.scratch[:], c.chunks, t) }

// content returns what the string t says: in place, or in buf when it is escaped or cut by a chunk's border. Then
// what buf cannot hold is left out.
func content(buf []byte, chunks [][]byte, t token) []byte {
	at, n := t.at, t.Len()
	if !t.escaped && t.chunk < len(chunks) && at+n <= len(chunks[t.chunk]) {
		return chunks[t.chunk][at : at+n]
	}
	raw := buf[:0]
	n = min(n, len(buf))
	for i := t.chunk; i < len(chunks) && len(raw) < n; i++ {
		piece := chunks[i][at:]
		raw = append(raw, piece[:min(n-len(raw), len(piece))]...)
		at = 0
	}
	if t.escaped {
		raw = unescape(raw)
	}
	return raw
}
