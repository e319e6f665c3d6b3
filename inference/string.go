// SPDX-License-Identifier: Apache-2.0

package inference

import (
	"encoding/binary"
	"encoding/json"
	"math/bits"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// maxKey is how many raw bytes of a key are looked at. Even if every character is a six-byte escape, more of the key
// fits than the longest name that means anything.
const maxKey = 256

// str reads the string whose opening quote is the next byte.
func (c *cursor) str() token {
	c.pos++
	t := token{kind: '"', chunk: c.chunk, at: c.pos, Span: Span{Start: c.offset()}}
	for {
		n, wide, escaped := stretch(c.cur[c.pos:])
		run := c.cur[c.pos : c.pos+n]
		c.pos += n
		t.escaped = t.escaped || escaped
		ends := c.pos < len(c.cur)
		if (wide || c.carried > 0) && !c.utf8(run, ends) {
			c.failAt(t.Start, "invalid UTF-8 in the string")
			return t
		}
		if !ends {
			if !c.more() {
				c.fail("the body ends inside a string")
				return t
			}
			continue
		}
		switch c.cur[c.pos] {
		case '"':
			t.End = c.offset()
			c.pos++
			return t
		case '\\':
			t.escaped = true
			c.pos++
			c.escape()
			if c.err != nil {
				return t
			}
		default:
			c.fail("control character in a string")
			return t
		}
	}
}

// stretch returns how far b goes on with plain runs and short escapes, whether any of it is not ASCII, and whether
// there were escapes.
func stretch(b []byte) (n int, wide, escaped bool) {
	for {
		k, w := plain(b[n:])
		n += k
		wide = wide || w
		if n+1 >= len(b) || b[n] != '\\' || !shortEscapes[b[n+1]] {
			return n, wide, escaped
		}
		escaped = true
		n += 2
	}
}

// shortEscapes are the bytes that may follow a backslash, but for u.
var shortEscapes = [256]bool{'"': true, '\\': true, '/': true, 'b': true, 'f': true, 'n': true, 'r': true, 't': true}

// escape reads what follows a backslash.
func (c *cursor) escape() {
	switch b := c.peek(); {
	case shortEscapes[b]:
		c.pos++
	case b == 'u':
		c.pos++
		for range 4 {
			if b := c.peek(); (b < '0' || b > '9') && (b|0x20 < 'a' || b|0x20 > 'f') {
				c.unexpected("a hexadecimal digit")
				return
			}
			c.pos++
		}
	default:
		c.unexpected("an escape")
	}
}

const (
	ones  = 0x0101010101010101
	highs = 0x8080808080808080
)

// special marks the bytes of w that end a plain run of a string: quotes and control characters, which are those up to
// 0x20 once a bit is flipped, and backslashes. Only the lowest mark is exact, since a borrow can mark bytes above it.
func special(w uint64) uint64 {
	low, slash := w^(ones*2), w^(ones*'\\')
	return ((low-ones*0x21)&^low | (slash-ones)&^slash) & highs
}

// plain returns how many bytes of b come before the first special one, and whether any of them is not ASCII.
func plain(b []byte) (n int, wide bool) {
	var seen uint64
	for len(b) >= 32 {
		w0, w1 := binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])
		w2, w3 := binary.LittleEndian.Uint64(b[16:]), binary.LittleEndian.Uint64(b[24:])
		m0, m1, m2, m3 := special(w0), special(w1), special(w2), special(w3)
		if m0|m1|m2|m3 == 0 {
			seen |= w0 | w1 | w2 | w3
			b, n = b[32:], n+32
			continue
		}
		if m0|m1 == 0 {
			seen |= w0 | w1
			n += 16
			w0, w1, m0, m1 = w2, w3, m2, m3
		}
		if m0 == 0 {
			seen |= w0
			n += 8
			w0, m0 = w1, m1
		}
		return ends(n, seen, w0, m0)
	}
	for len(b) >= 8 {
		w := binary.LittleEndian.Uint64(b)
		if m := special(w); m != 0 {
			return ends(n, seen, w, m)
		}
		seen |= w
		b, n = b[8:], n+8
	}
	for _, x := range b {
		if x < 0x20 || x == '"' || x == '\\' {
			break
		}
		seen |= uint64(x)
		n++
	}
	return n, seen&highs != 0
}

// ends finishes plain in word w, in which m marks the first special byte.
func ends(n int, seen, w, m uint64) (int, bool) {
	k := bits.TrailingZeros64(m) >> 3
	return n + k, (seen|w&(1<<(8*k)-1))&highs != 0
}

// utf8 checks a plain run of a string. Final says that the run ended before its chunk did, so no sequence may go on.
func (c *cursor) utf8(run []byte, final bool) bool {
	if c.carried > 0 {
		for len(run) > 0 && !utf8.FullRune(c.carry[:c.carried]) {
			c.carry[c.carried] = run[0]
			c.carried++
			run = run[1:]
		}
		if !utf8.FullRune(c.carry[:c.carried]) {
			return !final
		}
		if r, size := utf8.DecodeRune(c.carry[:c.carried]); r == utf8.RuneError && size == 1 {
			return false
		}
		c.carried = 0
	}
	if !final {
		for k := 1; k <= min(3, len(run)); k++ {
			if tail := run[len(run)-k:]; utf8.RuneStart(tail[0]) {
				if !utf8.FullRune(tail) {
					c.carried = copy(c.carry[:], tail)
					run = run[:len(run)-k]
				}
				break
			}
		}
	}
	return utf8.Valid(run)
}

// unescape decodes a valid JSON string in place. Half surrogate pairs become U+FFFD, as in encoding/json: the names
// that keys are compared with hold none. What a limit cut off in the middle is left out.
func unescape(raw []byte) []byte {
	out := raw[:0]
	for len(raw) > 0 {
		if raw[0] != '\\' {
			out = append(out, raw[0])
			raw = raw[1:]
			continue
		}
		if len(raw) < 2 {
			break
		}
		if i := strings.IndexByte("bfnrt", raw[1]); i >= 0 {
			out = append(out, "\b\f\n\r\t"[i])
			raw = raw[2:]
			continue
		}
		if raw[1] != 'u' {
			out = append(out, raw[1])
			raw = raw[2:]
			continue
		}
		r, n := escapedRune(raw), 6
		if utf16.IsSurrogate(r) {
			if r = utf16.DecodeRune(r, escapedRune(raw[min(6, len(raw)):])); r != utf8.RuneError {
				n = 12
			}
		}
		if len(raw) < n {
			break
		}
		raw = raw[n:]
		out = utf8.AppendRune(out, r)
	}
	return out
}

// escapedRune reads a \u escape, -1 where there is none.
func escapedRune(raw []byte) rune {
	if len(raw) < 6 || raw[0] != '\\' || raw[1] != 'u' {
		return -1
	}
	n, err := strconv.ParseUint(string(raw[2:6]), 16, 16)
	if err != nil {
		return -1
	}
	return rune(n)
}

// quote returns s as a JSON string.
func quote(s string) []byte {
	quoted, _ := json.Marshal(s) // never fails: bytes that are not UTF-8 become U+FFFD
	return quoted
}
