// SPDX-License-Identifier: Apache-2.0

package connectors

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/baton-epp/baton/inference"
)

// sglang is SGLang's P/D mode: a rendezvous in a room, a number that is minted here and goes into both legs with the
// address where the prefill endpoint can be met. Both legs must run at once: a prefill endpoint answers only when decode
// has come, and a decode endpoint refuses a request without a room. A decode whose prefill failed waits 300 s, so it is
// aborted by the request id that both legs carry.
//
// What it cannot do: with return_logprob over the prompt, SGLang's own gateway puts the prompt's logprobs, which only
// the prefill endpoint knows, before decode's. Here the answer does not pass through, so they are missing.
// Several choices (n > 1) are kept away by Traits.OneChoice: SGLang up to 0.5.18 sends all of them into the room of the
// first, where they hang, however many rooms it is given (sgl-project/sglang#30723).
type sglang struct{}

// sglangFields are what both legs carry, all of it the router's.
var sglangFields = []string{"bootstrap_host", "bootstrap_port", "bootstrap_room"}

// sglangPrefillRank tells decode at which data-parallel rank the prefill endpoint has the blocks. Without it the engines
// agree on one by the room; a client's would send decode to another, or to one that is not there.
const sglangPrefillRank = "disagg_prefill_dp_rank"

// sglangRanks are the fields by which a client could send the prefill leg to another rank than the room's.
var sglangRanks = []string{sglangPrefillRank, "routed_dp_rank", "data_parallel_rank"}

// maxRooms bounds the rooms of a batch that are listed. For a longer one the engine counts up from the first by itself.
const maxRooms = 1024

// maxCount bounds what an answer says of one prompt, so that sums do not overflow.
const maxCount = 1 << 32

// maxRequestID bounds what is taken over from a request id.
const maxRequestID = 64

func (sglang) Prefill(x *Exchange, body *inference.Edits) {
	one := []byte("1")
	body.Set("stream", []byte("false"))
	body.Remove("stream_options")
	// The number of choices stays: both legs need the same.
	for _, field := range sglangRanks {
		body.Remove(field)
	}
	if x.Request.API == inference.SGLangGenerate {
		body.SetSampling("max_new_tokens", one)
		body.RemoveSampling("min_new_tokens")
	} else {
		body.Set("max_tokens", one)
		if hasField(x.Request, "max_completion_tokens") {
			body.Set("max_completion_tokens", one)
		}
		body.Remove("min_tokens")
	}
	x.Ticket = sglangTicket(x.Request)
	rendezvous(x, body)
}

// sglangTicket mints a request id and, after a space, the room or, for prompts in a list, the list of their rooms.
func sglangTicket(r *inference.Request) string {
	var nonce [8]byte
	_, _ = rand.Read(nonce[:]) // never fails
	ticket := append([]byte(sglangRequestID(r.ID)), '-')
	ticket = append(hex.AppendEncode(ticket, nonce[:]), ' ')
	if r.Prompts > maxRooms || !isBatch(r) {
		return string(strconv.AppendInt(ticket, newRooms(1)[0], 10))
	}
	separator := byte('[')
	for _, room := range newRooms(r.Prompts) {
		ticket = strconv.AppendInt(append(ticket, separator), room, 10)
		separator = ','
	}
	return string(append(ticket, ']'))
}

// isBatch reports whether the prompts come in a list. It may be one of one prompt: SGLang would number a single request
// id, and find none to abort by it.
func isBatch(r *inference.Request) bool {
	if r.Prompts > 1 {
		return true
	}
	switch r.API {
	case inference.Completions:
		return listsPrompts(r, "prompt")
	case inference.SGLangGenerate:
		return listsPrompts(r, "text") || listsPrompts(r, "input_ids")
	default:
		return false
	}
}

// listsPrompts tells a list of prompts, strings or lists themselves, from one prompt as token ids.
func listsPrompts(r *inference.Request, field string) bool {
	if !isList(r, field) {
		return false
	}
	value, _ := r.Field(field)
	for _, chunk := range r.Body.Slice(inference.Span{Start: value.Start + 1, End: value.End}).Chunks {
		if chunk = bytes.TrimLeft(chunk, " \t\r\n"); len(chunk) > 0 {
			return chunk[0] == '"' || chunk[0] == '['
		}
	}
	return false
}

// sglangRequestID makes a client's request id fit to be part of a name.
func sglangRequestID(id string) string {
	if id == "" {
		return "baton"
	}
	return strings.Map(func(c rune) rune {
		if c == '-' || c == '_' || c == '.' || '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' {
			return c
		}
		return '_'
	}, id[:min(len(id), maxRequestID)])
}

// newRooms returns n different rooms, of 63 bits, that nobody can guess: two requests in one room have been seen to end
// the scheduler's process.
func newRooms(n int) []int64 {
	var b [8]byte
	rooms := make([]int64, 0, n)
	taken := make(map[int64]bool, n)
	for len(rooms) < n {
		_, _ = rand.Read(b[:]) // never fails
		room := int64(binary.BigEndian.Uint64(b[:]) >> 1)
		if room > math.MaxInt64-math.MaxInt32 || taken[room] { // the engine may count up from it
			continue
		}
		taken[room] = true
		rooms = append(rooms, room)
	}
	return rooms
}

// rendezvous writes what both legs have in common. In a batch, each prompt has a room of its own; the others' request ids
// begin with the first one's, so that one abort reaches all of them: SGLang looks for a request of exactly that id first,
// and then ends every one whose id begins so.
func rendezvous(x *Exchange, body *inference.Edits) {
	rid, rooms, ok := strings.Cut(x.Ticket, " ")
	if !ok {
		return // no prefill was asked for
	}
	host := strconv.Quote(hostOf(x.Prefiller))
	at := strconv.Itoa(port(x.Prefiller, BootstrapPortLabel, x.Ports.SGLang))
	rid = strconv.Quote(rid)
	if rooms[0] == '[' {
		n := 1 + strings.Count(rooms, ",")
		rid = rids(rid, n)
		host, at = repeated(host, n), repeated(at, n)
	}
	body.Set("bootstrap_host", []byte(host))
	body.Set("bootstrap_port", []byte(at))
	body.Set("bootstrap_room", []byte(rooms))
	body.Set("rid", []byte(rid))
}

func rids(first string, n int) string {
	list := []byte("[" + first)
	for i := 1; i < n; i++ {
		list = append(append(list, ','), first[:len(first)-1]...)
		list = append(strconv.AppendInt(append(list, '-'), int64(i), 10), '"')
	}
	return string(append(list, ']'))
}

func repeated(value string, n int) string {
	return "[" + strings.Repeat(value+",", n-1) + value + "]"
}

// Answer reads that of one prompt, an object, or of several, an array of these.
func (sglang) Answer(_ *Exchange, answer []byte) Answer {
	if answer = bytes.TrimSpace(answer); len(answer) == 0 || answer[0] != '[' {
		return sglangAnswer(answer)
	}
	if _, _, err := inference.Field(slices.Concat([]byte(`{"":`), answer, []byte{'}'}), ""); err != nil {
		return Answer{Verdict: Malformed, CachedTokens: -1}
	}
	sum := Answer{Verdict: Malformed, CachedTokens: -1}
	for i := 1; i < len(answer)-1; {
		if answer[i] == ',' || isSpace(answer[i]) {
			i++
			continue
		}
		end := valueEnd(answer, i)
		a := sglangAnswer(answer[i:end])
		if a.Verdict != Ready {
			return a
		}
		sum.Verdict = Ready
		sum.PromptTokens += min(a.PromptTokens, maxCount)
		if a.CachedTokens >= 0 {
			sum.CachedTokens = max(0, sum.CachedTokens) + min(a.CachedTokens, maxCount)
		}
		i = end
	}
	return sum
}

func sglangAnswer(answer []byte) Answer {
	r, settled := read(answer)
	if settled {
		return r.Answer
	}
	if meta := memberOf(r.object, "meta_info"); meta != nil {
		r.CachedTokens = natural(string(memberOf(meta, "cached_tokens")))
	}
	return r.Answer
}

func (sglang) Decode(x *Exchange, _ []byte, body *inference.Edits) {
	body.Remove(sglangPrefillRank)
	rendezvous(x, body)
}

func (sglang) Withdraw(_ *Exchange, body *inference.Edits) {
	for _, field := range sglangFields {
		body.Remove(field)
	}
	body.Restore("rid")
	body.Restore(sglangPrefillRank)
}

// Abort names nothing when there is no ticket: an empty request id is the beginning of all of them.
func (sglang) Abort(x *Exchange) (path string, body []byte) {
	rid, _, ok := strings.Cut(x.Ticket, " ")
	if !ok {
		return "", nil
	}
	return "/abort_request", []byte(`{"rid":` + strconv.Quote(rid) + `}`)
}

var _ Aborter = sglang{}
