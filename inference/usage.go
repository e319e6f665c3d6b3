// SPDX-License-Identifier: Apache-2.0

package inference

import "bytes"

// Usage is what a response says about itself. A field that is said several times counts as said last, which joins
// Anthropic's message_start and message_delta as well.
type Usage struct {
	Seen             bool  // any token count was there
	PromptTokens     int64 // the whole prompt, cached or not, whatever the API counts
	CompletionTokens int64
	CachedTokens     int64 // of the prompt's; 0 when the server does not say
	// FinishReason is the last finish_reason or stop_reason, or the status of a Responses object that has ended.
	FinishReason string
}

// A UsageScanner reads [Usage] out of a response, one JSON value or server-sent events of them, from chunks with any
// borders. Its memory is fixed, and events that say nothing of interest are hardly looked at. It does not check the
// JSON: it reads what model servers write. The zero value is ready for one response; not safe for concurrent use.
type UsageScanner struct {
	found tally
	mode  usageMode
	line  int // of an event stream: how much of "data:" began this line, or one of the two below
	lex   usageLexer
}

type usageMode uint8

const (
	undecided usageMode = iota
	oneValue
	eventStream
)

const dataField = "data:"

const (
	inData    = len(dataField)
	otherLine = -1
)

// Usage returns what was found so far.
func (u *UsageScanner) Usage() Usage {
	n := &u.found.counts
	return Usage{
		Seen:             u.found.seen,
		PromptTokens:     n[isPromptTokens] + n[isCacheRead] + n[isCacheCreated],
		CompletionTokens: n[isCompletionTokens],
		CachedTokens:     n[isCachedTokens] + n[isCacheRead],
		FinishReason:     u.found.reason,
	}
}

// Feed reads the next chunk. It keeps nothing of it.
func (u *UsageScanner) Feed(chunk []byte) {
	if u.mode == undecided {
		chunk = bytes.TrimLeft(chunk, " \t\r\n")
		if len(chunk) == 0 {
			return
		}
		u.mode = eventStream
		if chunk[0] == '{' || chunk[0] == '[' {
			u.mode = oneValue
		}
	}
	if u.mode == oneValue {
		u.found.edit.rest = len(chunk)
		u.lex.feed(chunk, &u.found)
		return
	}
	if u.line == 0 && u.lex.idle() && bytes.HasSuffix(chunk, []byte("\n\n")) && boring(chunk) {
		return
	}
	for len(chunk) > 0 {
		chunk = chunk[u.feedLine(chunk):]
	}
}

// feedLine reads at most to the end of a line and returns how many bytes that were.
func (u *UsageScanner) feedLine(chunk []byte) int {
	if u.line >= 0 && u.line < inData && chunk[0] != '\n' {
		switch {
		case chunk[0] == dataField[u.line]:
			u.line++
		case u.line == 0 && chunk[0] == '\r': // of a blank line
		default:
			u.line = otherLine
		}
		return 1
	}
	n := bytes.IndexByte(chunk, '\n')
	end := n >= 0
	if !end {
		n = len(chunk)
	}
	if u.line == inData {
		u.found.edit.rest = len(chunk)
		u.lex.feed(chunk[:n], &u.found)
	}
	if !end {
		return n
	}
	// An event's lines are joined by line feeds, which cannot stand in a string; a blank line ends the event.
	if u.line == 0 || u.lex.state == lexString {
		u.lex = usageLexer{}
	} else if u.line == inData {
		u.found.edit.rest = len(chunk) - n
		u.lex.feed(chunk[n:n+1], &u.found)
	}
	u.line = 0
	return n + 1
}

// boring reports whether whole events hold no key whose value matters. Keys are compared as they are written, here as
// in the lexer: no server escapes them. The needles begin with bytes that are rare in JSON, which is what makes
// looking for them cheap.
func boring(events []byte) bool {
	if bytes.Contains(events, []byte(`usage"`)) || bytes.Contains(events, []byte(`status"`)) {
		return false
	}
	for {
		i := bytes.IndexByte(events, '_')
		if i < 0 {
			return true
		}
		events = events[i+1:]
		if after, ok := bytes.CutPrefix(events, []byte(`reason"`)); ok {
			if !bytes.HasPrefix(after, []byte(":null")) && !bytes.HasPrefix(after, []byte(": null")) {
				return false
			}
		} else if bytes.HasPrefix(events, []byte(`info"`)) {
			return false
		}
	}
}
