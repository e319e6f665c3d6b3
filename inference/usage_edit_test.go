// SPDX-License-Identifier: Apache-2.0

package inference

import (
	"bytes"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/baton-epp/baton/internal/alloctest"
)

// corrected passes chunks through Correct and checks what holds for any of them: what is not changed is the chunk
// itself, and no more is held back than may be.
func corrected(tb testing.TB, chunks [][]byte, cached int64) ([]byte, *UsageScanner) {
	tb.Helper()
	var u UsageScanner
	var in, out []byte
	for i, chunk := range chunks {
		before := bytes.Clone(chunk)
		sent, changed := u.Correct(chunk, cached, i == len(chunks)-1)
		if !changed && (len(sent) != len(chunk) || len(chunk) > 0 && &sent[0] != &chunk[0]) {
			tb.Fatalf("%q is said to be unchanged and is %q", chunk, sent)
		}
		if !bytes.Equal(before, chunk) {
			tb.Fatalf("the chunk %q was written to: %q", before, chunk)
		}
		in, out = append(in, chunk...), append(out, sent...)
		if held := len(in) - len(out); held < 0 || held > longestCount {
			tb.Fatalf("%d bytes held after %q", held, in)
		}
	}
	if len(in) != len(out) {
		tb.Fatalf("%q became %q", in, out)
	}
	return out, &u
}

// pieces cuts b into chunks of n bytes.
func pieces(b []byte, n int) (chunks [][]byte) {
	for ; len(b) > n; b = b[n:] {
		chunks = append(chunks, b[:n:n])
	}
	return append(chunks, b)
}

func TestCorrect(t *testing.T) {
	f := func(cached int64, body, want string) {
		t.Helper()
		for n := 1; n <= len(body); n++ {
			out, u := corrected(t, pieces([]byte(body), n), cached)
			if string(out) != want || u.Corrected() != (body != want) {
				t.Errorf("%s by %d: got %s, corrected %v, want %s", body, n, out, u.Corrected(), want)
			}
		}
	}
	chat := func(cached string) string {
		return `{"choices":[{"message":{"content":"\"usage\":{\"prompt_tokens_details\":{\"cached_tokens\":99}}",` +
			`"tool_calls":[{"function":{"arguments":"{\"cached_tokens\": 99}"}}]}}],"usage":{"prompt_tokens":104,` +
			`"prompt_tokens_details":{"cached_tokens":` + cached + `,"created_cache_tokens":0},"total_tokens":108}}`
	}
	f(0, chat("104"), chat("0  "))
	f(32, chat("104"), chat("32 "))
	f(103, chat("104"), chat("103"))
	f(104, chat("104"), chat("104"))
	f(105, chat("104"), chat("104"))
	f(-1, chat("104"), chat("104"))
	f(7, chat(" 1024 "), chat(" 7    "))
	f(0, chat("0"), chat("0"))
	f(0, chat("null"), chat("null"))
	f(0, chat("12.5"), chat("12.5"))
	f(0, chat("1e5"), chat("1e5"))
	f(0, chat("-9"), chat("-9"))
	f(0, chat(`"104"`), chat(`"104"`))
	f(0, chat(`[104]`), chat(`[104]`))
	f(0, chat(`{"cached_tokens":104}`), chat(`{"cached_tokens":104}`))
	f(5, chat("9999999999999999999"), chat("5                  "))
	f(5, chat("99999999999999999999"), chat("99999999999999999999")) // longer than any count
	f(5, chat(strings.Repeat("9", 60)), chat(strings.Repeat("9", 60)))

	event := func(cached string) string {
		return "data: {\"choices\":[{\"delta\":{\"content\":\" ho\"},\"finish_reason\":null}]}\n\n" +
			"data: {\"choices\":[],\"usage\":{\"prompt_tokens\":104,\"prompt_tokens_details\":{\"cached_tokens\":" + cached + "}}}\n\ndata: [DONE]\n\n"
	}
	f(16, event("104"), event("16 "))
	f(16, strings.ReplaceAll(event("104"), "\n", "\r\n"), strings.ReplaceAll(event("16 "), "\n", "\r\n"))
	f(16, event("104\ndata: "), event("16 \ndata: "))
	f(16, event("104\r\ndata: "), event("16 \r\ndata: "))
	f(16, event("104")+event("208"), event("16 ")+event("16 "))
	responses := func(cached string) string {
		return "event: response.completed\ndata: {\"response\":{\"output\":[{\"content\":[{\"text\":\"cached_tokens\"}]}],\"status\":\"completed\"," +
			"\"usage\":{\"input_tokens\":15,\"input_tokens_details\":{\"cached_tokens\":" + cached + ",\"cached_tokens_per_turn\":[14]}}}}\n\n"
	}
	f(0, responses("14"), responses("0 "))

	for _, elsewhere := range []string{
		`{"prompt_tokens_details":{"cached_tokens":104}}`,
		`{"usage":{"cached_tokens":104}}`,
		`{"usage":{"completion_tokens_details":{"cached_tokens":104}}}`,
		`{"usage":{"prompt_tokens_details":[{"cached_tokens":104}]}}`,
		`{"usage":[{"prompt_tokens_details":{"cached_tokens":104}}]}`,
		`{"usage":{"prompt_tokens_details":{"x":{"cached_tokens":104}}}}`,
		`{"choices":[{"usage":{"prompt_tokens_details":{"cached_tokens":104}}}]}`,
		`{"x":{"usage":{"prompt_tokens_details":{"cached_tokens":104}}}}`,
		`[{"usage":{"prompt_tokens_details":{"cached_tokens":104}}}]`,
		`{"meta_info":{"cached_tokens":104}}`,
		`{"usage":{"input_tokens":1,"cache_read_input_tokens":104}}`,
		`{"usage":{"prompt_tokens_details":{"cached_tokens":104`,
		`{"usage":{"prompt_tokens_details":{"cached_tokens":`,
	} {
		f(0, elsewhere, elsewhere)
	}
}

func TestCorrectCaptured(t *testing.T) {
	f := func(name, old, want string) {
		t.Helper()
		body := payload(t, name)
		if n := bytes.Count(body, []byte(old)); n != 1 {
			t.Fatalf("%s: %d of %s", name, n, old)
		}
		for _, n := range []int{1, 2, 3, 7, 64, 1000, len(body)} {
			out, _ := corrected(t, pieces(body, n), 1)
			if !bytes.Equal(out, bytes.Replace(body, []byte(old), []byte(want), 1)) {
				t.Errorf("%s by %d: %s", name, n, out)
			}
		}
	}
	f("chat_n2_logprobs", `"cached_tokens":32`, `"cached_tokens":1 `)
	f("chat_stream_usage", `"cached_tokens":32`, `"cached_tokens":1 `)
	f("responses", `"cached_tokens":0`, `"cached_tokens":0`)
	f("i_messages_prefill", `"cache_read_input_tokens":224`, `"cache_read_input_tokens":224`)
}

// TestCorrectedCountIsTheOneReported: metrics show what the client sees.
func TestCorrectedCountIsTheOneReported(t *testing.T) {
	body := []byte(`{"usage":{"prompt_tokens":104,"prompt_tokens_details":{"cached_tokens":104}}}`)
	_, u := corrected(t, pieces(body, len(body)), 3)
	if got := u.Usage(); got.CachedTokens != 3 || got.PromptTokens != 104 {
		t.Errorf("got %+v", got)
	}
}

// TestCorrectFromNowOn: the prefill beside decode may end while a number is on its way; what was sent on stays.
func TestCorrectFromNowOn(t *testing.T) {
	body := []byte(`{"usage":{"prompt_tokens_details":{"cached_tokens":1024}}}`)
	for cut := range body {
		var u UsageScanner
		first, _ := u.Correct(body[:cut], -1, false)
		second, _ := u.Correct(body[cut:], 0, true)
		want := string(body)
		if cut <= strings.Index(want, "1024") {
			want = strings.Replace(want, "1024", "0   ", 1)
		}
		if got := string(first) + string(second); got != want {
			t.Errorf("cut at %d: %s", cut, got)
		}
	}
}

func TestHeldDigitsAreHandedOver(t *testing.T) {
	var u UsageScanner
	out, changed := u.Correct([]byte(`{"usage":{"prompt_tokens_details":{"cached_tokens":104`), 0, false)
	if !changed || !bytes.HasSuffix(out, []byte(":")) {
		t.Fatalf("got %s, changed %v", out, changed)
	}
	if held := u.Held(); string(held) != "104" {
		t.Errorf("held %q", held)
	}
	if held := u.Held(); len(held) != 0 {
		t.Errorf("held again: %q", held)
	}
}

func TestCorrectAllocations(t *testing.T) {
	f := func(name string, limit float64, chunks ...string) {
		t.Helper()
		var all [][]byte
		for _, c := range chunks {
			all = append(all, []byte(c))
		}
		var u UsageScanner
		alloctest.AtMost(t, limit, name, func() {
			for _, c := range all {
				u.Correct(c, 0, false)
			}
		})
	}
	token := "data: {\"id\":\"chatcmpl-1\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" ho\"},\"finish_reason\":null}]}\n\n"
	usage := "data: {\"choices\":[],\"usage\":{\"prompt_tokens_details\":{\"cached_tokens\":104}}}\n\n"
	f("token", 0, token)
	f("token in halves", 0, token[:50], token[50:])
	f("usage that is right", 0, strings.Replace(usage, "104", "0", 1))
	f("usage", 1, usage)
	f("usage in halves", 1, usage[:70], usage[70:])
	f("usage, the number in halves", 1, usage[:74], usage[74:])
}

// slowCorrect corrects with encoding/json; known marks the bytes that it answers for, which is not those of events that
// are no JSON or are not written as model servers do.
func slowCorrect(body []byte, cached int64) (want []byte, known []bool) {
	want, known = bytes.Clone(body), make([]bool, len(body))
	start := len(body) - len(bytes.TrimLeft(body, " \t\r\n"))
	one := func(from, to int) {
		if json.Valid(body[from:to]) {
			slowCorrectOne(want[from:to], cached)
			for i := from; i < to; i++ {
				known[i] = true
			}
		}
	}
	if start < len(body) && (body[start] == '{' || body[start] == '[') {
		one(start, len(body))
		return want, known
	}
	for start < len(body) {
		end := len(body)
		if n := bytes.Index(body[start:], []byte("\n\n")); n >= 0 {
			end = start + n
		}
		data := -1
		for at := start; at < end; {
			line := body[at:end]
			if n := bytes.IndexByte(line, '\n'); n >= 0 {
				line = line[:n]
			}
			if bytes.HasPrefix(line, []byte(dataField)) || bytes.ContainsRune(line, '\r') {
				if data >= 0 || bytes.ContainsRune(line, '\r') {
					data = len(body) // several, or line ends of another kind
					break
				}
				data = at
			}
			at += len(line) + 1
		}
		if data >= 0 && data < len(body) {
			to := end
			if n := bytes.IndexByte(body[data:end], '\n'); n >= 0 {
				to = data + n
			}
			one(data+len(dataField), to)
		}
		start = end + 2
	}
	return want, known
}

// slowCorrectOne corrects one JSON text in place, by the decoder's tokens and offsets.
func slowCorrectOne(doc []byte, cached int64) {
	in := bytes.Clone(doc)
	d := json.NewDecoder(bytes.NewReader(in))
	d.UseNumber()
	var path []string // of the containers; "[" for an array, "{" and then the key for an object
	value := func() {
		if n := len(path); n > 0 && path[n-1] != "[" {
			path[n-1] = "{"
		}
	}
	for {
		token, err := d.Token()
		if err != nil {
			return
		}
		end := int(d.InputOffset())
		switch v := token.(type) {
		case json.Delim:
			if v == '{' || v == '[' {
				path = append(path, v.String())
				continue
			}
			path = path[:len(path)-1]
		case string:
			if n := len(path); n > 0 && path[n-1] == "{" {
				path[n-1] = "."
				if quoted := `"` + v + `"`; end >= len(quoted) && string(in[end-len(quoted):end]) == quoted {
					path[n-1] = "." + v
				}
				continue
			}
		case json.Number:
			at := strings.TrimPrefix(strings.Join(path, ""), ".response")
			if at != ".usage.prompt_tokens_details.cached_tokens" && at != ".usage.input_tokens_details.cached_tokens" {
				at = strings.TrimPrefix(strings.TrimPrefix(at, ".message"), ".delta")
			}
			slot := doc[end-len(v) : end]
			if (at == ".usage.prompt_tokens_details.cached_tokens" || at == ".usage.input_tokens_details.cached_tokens") && above(string(v), cached) {
				copy(slot, fmt.Sprintf("%-*d", len(slot), cached))
			}
		}
		value()
	}
}

// above reports whether a literal is a count above n.
func above(literal string, n int64) bool {
	if len(literal) > longestCount || strings.ContainsAny(literal, "-+.eE") {
		return false
	}
	limit := strconv.FormatInt(n, 10)
	return len(literal) > len(limit) || len(literal) == len(limit) && literal > limit
}

// FuzzCorrect holds Correct against encoding/json, event by event, and against itself on other chunks: nothing but the
// number may change, and nothing may be lost.
func FuzzCorrect(f *testing.F) {
	files, _ := filepath.Glob("testdata/*.response.http")
	for _, file := range files {
		f.Add(payload(f, strings.TrimSuffix(filepath.Base(file), ".response.http")), []byte{5, 1}, uint16(1))
	}
	for _, usage := range []string{
		`{"usage":{"prompt_tokens_details":{"cached_tokens":104}}}`,
		`{"response":{"usage":{"input_tokens_details":{"cached_tokens":104}}}}`,
		`{"a":"\"usage\":{","usage":{"prompt_tokens_details":{"cached_tokens" : 20000 , "x":1}},"usage":{}}`,
	} {
		f.Add([]byte(usage), []byte{1}, uint16(3))
		f.Add([]byte("event: x\ndata: "+usage+"\n\ndata: [DONE]\n\n"), []byte{40, 3}, uint16(16))
		f.Add([]byte("data: {\"usage\": null}\n\ndata: "+usage+"\n\ndata: "+usage+"\n\n"), []byte{60, 1, 0, 1}, uint16(0))
		f.Add([]byte("data: "+usage+"\r\n\r\n"), []byte{54}, uint16(0))
	}
	f.Fuzz(func(t *testing.T, body, sizes []byte, n uint16) {
		cached := int64(n) - 1
		whole, _ := corrected(t, [][]byte{body}, cached)
		chunks := split(body, sizes).Chunks
		if len(chunks) > 0 {
			if parted, _ := corrected(t, chunks, cached); !bytes.Equal(parted, whole) {
				t.Fatalf("%q by %v: %q, whole %q", body, sizes, parted, whole)
			}
		}
		want, known := slowCorrect(body, cached)
		for i := range body {
			same := whole[i] == body[i]
			if cached < 0 && !same || !same && (body[i] < '0' || body[i] > '9' || whole[i] != ' ' && (whole[i] < '0' || whole[i] > '9')) {
				t.Fatalf("%q became %q", body, whole)
			}
			if cached >= 0 && known[i] && whole[i] != want[i] {
				t.Fatalf("%q: got %q, encoding/json %q", body, whole, want)
			}
		}
	})
}

func BenchmarkCorrect(b *testing.B) {
	token := "data: {\"id\":\"chatcmpl-a116a85c3323fb83\",\"object\":\"chat.completion.chunk\",\"created\":1795314092,\"model\":\"tiny\"," +
		"\"choices\":[{\"index\":0,\"delta\":{\"content\":\" ho\"},\"logprobs\":null,\"finish_reason\":null,\"token_ids\":null}]}\n\n"
	usage := "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":104,\"prompt_tokens_details\":{\"cached_tokens\":104}}}\n\n"
	run := func(name, text string, cut int) {
		b.Run(name, func(b *testing.B) {
			var u UsageScanner
			event := []byte(text)
			b.SetBytes(int64(len(event)))
			b.ReportAllocs()
			for b.Loop() {
				u.Correct(event[:cut], 0, false)
				u.Correct(event[cut:], 0, false)
			}
		})
	}
	run("chunk=event", token, len(token))
	run("chunk=half", token, len(token)/2)
	run("usage/chunk=event", usage, len(usage))
	run("usage/chunk=half", usage, strings.Index(usage, "104}"))
}
