// SPDX-License-Identifier: Apache-2.0

package inference

import (
	"bytes"
	"strconv"
)

// longestCount is how many digits of a count may be held back; whatever is longer counts no tokens.
const longestCount = 19

// A usageEdit overwrites counts of cached prompt tokens as the lexer comes upon them.
type usageEdit struct {
	to    int64  // what a higher count becomes
	out   []byte // what was held and the chunk, while they are read; nil when nothing may be changed
	rest  int    // bytes from the first that the lexer reads now to the end of out
	owned bool   // out is a copy
	wrote bool
	kept  int // digits of a count that may go on in the next chunk
	held  [longestCount]byte
}

// Correct is Feed for a response on its way to the client. It returns what is to be sent on in place of chunk, and whether
// that is anything but chunk itself. A count of cached prompt tokens (prompt_tokens_details.cached_tokens in usage, or
// input_tokens_details.cached_tokens) that is above cached is overwritten by it and filled up with blanks, so the length of
// the whole stays the same; cached below 0 changes nothing. Unless this is the last chunk, digits of such a count at its
// end may be held back, 19 at most, and come first next time. A changed chunk is a copy.
//
// Anthropic's cache_read_input_tokens is left as it is: input_tokens does not include it, so both would have to change,
// and the greater one need not fit where the smaller stood.
func (u *UsageScanner) Correct(chunk []byte, cached int64, last bool) (out []byte, changed bool) {
	e := &u.found.edit
	if cached < 0 && e.kept == 0 {
		u.Feed(chunk)
		return chunk, false
	}
	e.to, e.out, e.owned = cached, chunk, e.kept > 0
	if e.owned {
		e.out = append(append(make([]byte, 0, e.kept+len(chunk)), e.held[:e.kept]...), chunk...)
		e.kept = 0
	}
	u.Feed(chunk)
	out, changed = e.out, e.owned
	e.out = nil
	if digits := u.lex.length; !last && cached >= 0 && u.lex.counting() && digits <= min(longestCount, len(out)) {
		e.kept = copy(e.held[:], out[len(out)-digits:])
		out, changed = out[:len(out)-digits], true
	}
	return out, changed
}

// Held returns what Correct holds back, for responses that turn out to have ended; the scanner no longer has it.
func (u *UsageScanner) Held() []byte {
	e := &u.found.edit
	held := bytes.Clone(e.held[:e.kept])
	e.kept = 0
	return held
}

// Corrected reports whether Correct has overwritten a count.
func (u *UsageScanner) Corrected() bool { return u.found.edit.wrote }

// counting reports whether the lexer stands in a count that may be overwritten.
func (l *usageLexer) counting() bool { return l.state == lexNumber && l.correctable() }

// correctable reports whether the number just read is one of the usage of a single result.
func (l *usageLexer) correctable() bool {
	return l.next == isCachedTokens && l.depth <= nesting && l.stack[l.depth-1].place == inDetails && !l.stack[0].array
}

// overwrite writes over the number of so many digits before the byte at i of what the lexer reads, and returns what the
// client sees. One that began in a chunk that has been sent on stays.
func (e *usageEdit) overwrite(i, digits int, number int64) int64 {
	end := len(e.out) - e.rest + i
	if e.out == nil || e.to < 0 || number <= e.to || digits > min(end, longestCount) {
		return number
	}
	if !e.owned {
		e.out, e.owned = bytes.Clone(e.out), true
	}
	at := e.out[end-digits : end : end]
	for n := len(strconv.AppendInt(at[:0], e.to, 10)); n < digits; n++ {
		at[n] = ' '
	}
	e.wrote = true
	return e.to
}
