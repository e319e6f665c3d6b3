// SPDX-License-Identifier: Apache-2.0

package connectors

import (
	"bytes"
	"encoding/json"

	"github.com/baton-epp/baton/inference"
)

// members finds where the values of the named members of object are, in one pass, whatever else is in it, and puts
// them into found: of duplicates the last, as Python reads them. A name that is not there leaves its span as it was.
// object must be one valid JSON object without space around it, as inference.Field returns it.
func members(object []byte, names []string, found []inference.Span) {
	for i := 1; i < len(object)-1; {
		if object[i] != '"' {
			i++ // space or comma
			continue
		}
		keyEnd := stringEnd(object, i)
		key := object[i+1 : keyEnd-1]
		start := keyEnd
		for object[start] == ':' || isSpace(object[start]) {
			start++
		}
		end := valueEnd(object, start)
		for n, name := range names {
			if string(key) == name || keyIs(object[i:keyEnd], name) {
				found[n] = inference.Span{Start: start, End: end}
			}
		}
		i = end
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
