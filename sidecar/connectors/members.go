// SPDX-License-Identifier: Apache-2.0

package connectors

import (
	"bytes"
	"encoding/json"
	"iter"

	"github.com/baton-epp/baton/inference"
)

// members finds where the values of the named members of object are, in one pass, whatever else is in it, and puts
// them into found: of duplicates the last, as Python reads them. A name that is not there leaves its span as it was.
// object must be one valid JSON object without space around it, as inference.Field returns it.
func members(object []byte, names []string, found []inference.Span) {
	for key, value := range pairs(object) {
		for n, name := range names {
			if string(object[key.Start+1:key.End-1]) == name || keyIs(object[key.Start:key.End], name) {
				found[n] = value
			}
		}
	}
}

// pairs goes over where the keys, with their quotes, and the values of object are, which must be as for members.
func pairs(object []byte) iter.Seq2[inference.Span, inference.Span] {
	return func(yield func(key, value inference.Span) bool) {
		for i := 1; i < len(object)-1; {
			if object[i] != '"' {
				i++ // space or comma
				continue
			}
			keyEnd := stringEnd(object, i)
			start := keyEnd
			for object[start] == ':' || isSpace(object[start]) {
				start++
			}
			end := valueEnd(object, start)
			if !yield(inference.Span{Start: i, End: keyEnd}, inference.Span{Start: start, End: end}) {
				return
			}
			i = end
		}
	}
}

// keyIs compares a quoted key that contains escapes.
func keyIs(quoted []byte, name string) bool {
	if bytes.IndexByte(quoted, '\\') < 0 {
		return false
	}
	var key string
	return json.Unmarshal(quoted, &key) == nil && key == name
}

// wholeObject returns an object without the space around it, once it was checked. Python's NaN, which engines do not
// write and not all read, is no JSON here.
func wholeObject(data []byte) (object []byte, ok bool) {
	if _, _, err := inference.Field(data, ""); err != nil || !json.Valid(data) {
		return nil, false
	}
	return bytes.TrimSpace(data), true
}

// memberOf returns the raw value of a member of a valid JSON value; nil when that is no object, or has none.
func memberOf(value []byte, name string) []byte {
	if len(value) == 0 || value[0] != '{' {
		return nil
	}
	var found [1]inference.Span
	if members(value, []string{name}, found[:]); found[0].End == 0 {
		return nil
	}
	return value[found[0].Start:found[0].End:found[0].End]
}

func text(object []byte, s inference.Span) string { return string(object[s.Start:s.End]) }

func startsWith(object []byte, s inference.Span, c byte) bool {
	return s.Len() > 0 && object[s.Start] == c
}

// stringEnd returns the offset behind the string that starts at i.
func stringEnd(b []byte, i int) int {
	for i++; b[i] != '"'; i++ {
		if b[i] == '\\' {
			i++
		}
	}
	return i + 1
}

// valueEnd returns the offset behind the value that starts at i.
func valueEnd(b []byte, i int) int {
	depth := 0
	for i < len(b) {
		switch c := b[i]; c {
		case '"':
			i = stringEnd(b, i)
			if depth == 0 {
				return i
			}
			continue
		case '{', '[':
			depth++
		case '}', ']':
			if depth == 0 {
				return i // of the object around a number, true, false or null
			}
			if depth--; depth == 0 {
				return i + 1
			}
		case ',', ' ', '\t', '\n', '\r':
			if depth == 0 {
				return i
			}
		}
		i++
	}
	return i
}

func isSpace(c byte) bool { return c == ' ' || c == '\t' || c == '\n' || c == '\r' }
