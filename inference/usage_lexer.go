// SPDX-License-Identifier: Apache-2.0

package inference

// A place is where in a response the lexer is, or which field it found there.
type place uint8

const (
	elsewhere  place = iota
	atRoot           // of the response, or of an event
	inEnvelope       // the object around it in some events
	inChoice
	inUsage
	inDetails
	inMeta // SGLang
	isPromptTokens
	isCompletionTokens
	isCachedTokens
	isCacheRead // Anthropic, whose input_tokens are those besides
	isCacheCreated
	isFinishReason
	isStatus
)

// A tally is what the lexer found.
type tally struct {
	seen   bool
	counts [isCacheCreated + 1]int64
	reason string
	edit   usageEdit
}

// ways leads from place to place by key. A finish reason may be an object with a type (SGLang).
var ways = [...]map[string]place{
	atRoot: {
		"response": inEnvelope, "message": inEnvelope, "delta": inEnvelope, "choices": inChoice, "usage": inUsage,
		"meta_info": inMeta, "stop_reason": isFinishReason, "status": isStatus,
	},
	inEnvelope: {"usage": inUsage, "stop_reason": isFinishReason, "status": isStatus},
	inChoice:   {"finish_reason": isFinishReason},
	inUsage: {
		"prompt_tokens": isPromptTokens, "input_tokens": isPromptTokens,
		"completion_tokens": isCompletionTokens, "output_tokens": isCompletionTokens,
		"prompt_tokens_details": inDetails, "input_tokens_details": inDetails,
		"cache_read_input_tokens": isCacheRead, "cache_creation_input_tokens": isCacheCreated,
	},
	inDetails: {"cached_tokens": isCachedTokens},
	inMeta: {
		"prompt_tokens": isPromptTokens, "completion_tokens": isCompletionTokens, "cached_tokens": isCachedTokens,
		"finish_reason": isFinishReason,
	},
	isFinishReason: {"type": isFinishReason},
	isStatus:       nil,
}

type lexState uint8

const (
	lexAny lexState = iota
	lexString
	lexEscape
	lexNumber
)

// nesting is how deep the lexer keeps track; what lies deeper is elsewhere.
const nesting = 8

// longestWord is the length up to which keys and reasons are kept.
const longestWord = 32

// A usageLexer walks over JSON that comes byte by byte.
type usageLexer struct {
	state   lexState
	wantKey bool // the next string is a key
	next    place
	depth   int
	stack   [nesting]struct {
		place place
		array bool
	}
	word   [longestWord]byte
	length int // of the word, above longestWord when it does not fit or is escaped; or of the number, in digits
	number int64
}

// idle reports whether the lexer stands between values.
func (l *usageLexer) idle() bool { return l.depth == 0 && l.state == lexAny }

func (l *usageLexer) feed(b []byte, t *tally) {
	for i := 0; i < len(b); {
		switch l.state {
		case lexString:
			i += l.readString(b[i:], t)
			continue
		case lexEscape:
			l.state = lexString
			i++
			continue
		case lexNumber:
			if b[i] >= '0' && b[i] <= '9' {
				l.number = min(l.number*10+int64(b[i]-'0'), 1<<50)
				l.length++
				i++
				continue
			}
			l.state = lexAny
			l.count(b, i, t)
		case lexAny:
		}
		l.step(b[i])
		i++
	}
}

// step reads one byte outside of strings and counted numbers.
func (l *usageLexer) step(b byte) {
	switch b {
	case ' ', '\t', '\r', '\n', ':':
	case '"':
		l.state, l.length = lexString, 0
	case '{', '[':
		l.push(b == '[')
	case '}', ']':
		l.depth = max(0, l.depth-1)
		l.wantKey, l.next = false, elsewhere
	case ',':
		l.wantKey, l.next = false, elsewhere
		if l.depth > 0 && l.depth <= nesting {
			if top := l.stack[l.depth-1]; top.array {
				l.next = top.place
			} else {
				l.wantKey = true
			}
		}
	default:
		if b >= '0' && b <= '9' && l.next >= isPromptTokens && l.next <= isCacheCreated {
			l.state, l.number, l.length = lexNumber, int64(b-'0'), 1
			return
		}
		l.next = elsewhere
	}
}

func (l *usageLexer) push(array bool) {
	at := l.next
	if l.depth == 0 {
		at = atRoot
	}
	if array && at != atRoot && at != inChoice {
		at = elsewhere
	}
	if l.depth < nesting {
		l.stack[l.depth].place, l.stack[l.depth].array = at, array
	}
	l.depth++
	l.wantKey, l.next = !array, elsewhere
	if array {
		l.next = at
	}
}

// readString reads on in a string and returns how many bytes it took.
func (l *usageLexer) readString(b []byte, t *tally) int {
	n, _ := plain(b)
	if l.length+n <= longestWord {
		copy(l.word[l.length:], b[:n])
	}
	l.length += n
	if n == len(b) {
		return n
	}
	switch b[n] {
	case '"':
		l.state = lexAny
		l.endString(t)
	case '\\':
		l.state = lexEscape
		l.length += longestWord
	default: // a control character
		l.length += longestWord
	}
	return n + 1
}

func (l *usageLexer) endString(t *tally) {
	next, isKey := l.next, l.wantKey
	l.next, l.wantKey = elsewhere, false
	if l.length > longestWord {
		return
	}
	word := l.word[:l.length]
	switch {
	case isKey:
		if l.depth <= nesting {
			l.next = ways[l.stack[l.depth-1].place][string(word)]
		}
	case next == isStatus && (string(word) == "in_progress" || string(word) == "queued"):
	case next == isFinishReason || next == isStatus:
		if t.reason != string(word) {
			t.reason = string(word)
		}
	}
}

// count takes a number that ended before b[i]; one with a fraction or an exponent is no count.
func (l *usageLexer) count(b []byte, i int, t *tally) {
	switch b[i] {
	case ',', '}', ']', ' ', '\t', '\r', '\n':
		if l.correctable() {
			l.number = t.edit.overwrite(i, l.length, l.number)
		}
		t.seen = true
		t.counts[l.next] = l.number
	}
	l.next = elsewhere
}
