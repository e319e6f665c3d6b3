// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"net/http"
	"strings"
	"testing"
	"time"
)

// TestSeveralAnswersOfOnePrefill is what a real vLLM 0.32 does with more than one sequence in a prefill leg: one
// handle, and the rest stays pinned until its lease ends.
func TestSeveralAnswersOfOnePrefill(t *testing.T) {
	two := "[" + prompt(200, 1) + "," + prompt(200, 2) + "]"
	tests := []struct {
		name, prompt, extra string
		decode              string // of the handle's prompt
		answers             int    // that the decode leg asks for
	}{
		{"two answers", prompt(200, 1), `,"n":2`, prompt(200, 1), 1},
		{"two answers, both wanted", prompt(200, 1), `,"n":2`, prompt(200, 1), 2},
		{"two prompts", two, "", prompt(200, 1), 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p, d := newPair(t, pairOptions)
			want := text(t, post(t, d, "/v1/completions", complete(tt.decode, 8, `,"cache_salt":"s"`)))
			h := prefillLeg(t, p, tt.prompt, tt.extra)
			if n := len(p.Held()); n != 2 {
				t.Fatalf("held: %+v", p.Held())
			}
			n := `,"n":` + string(marshal(tt.answers))
			r := post(t, d, "/v1/completions", complete(tt.decode, 8, n+withHandle(h)))
			if got := text(t, r); got != want {
				t.Errorf("text %q, want %q", got, want)
			}
			if choices, _ := r.json(t)["choices"].([]any); len(choices) != tt.answers {
				t.Errorf("%d answers, want %d", len(choices), tt.answers)
			}
			if held := p.Held(); len(held) != 1 {
				t.Errorf("held after the fetch: %+v", held)
			}
			leaks(t, p, 1)
			if !strings.Contains(p.Leaked()[0].Reason, "another answer's handle was given") {
				t.Errorf("leak: %+v", p.Leaked())
			}
		})
	}
}

// TestDecodeOfOneToken pulls the whole prompt for the token that the prefill had made.
func TestDecodeOfOneToken(t *testing.T) {
	p, d := newPair(t, pairOptions)
	r := post(t, p, "/v1/completions", complete(prompt(200, 1), 1, askHandle))
	got := post(t, d, "/v1/completions", complete(prompt(200, 1), 1, extra(t, transferOf(t, r))))
	if text(t, got) != text(t, r) || d.Stats().PulledTokens != 200 {
		t.Errorf("text %q, prefill's %q, stats %+v", text(t, got), text(t, r), d.Stats())
	}
	leaks(t, p, 0)
}

func TestWireSeveralAnswersOfOnePrefill(t *testing.T) {
	for _, d := range dialects() {
		t.Run(d.connector, func(t *testing.T) {
			t.Parallel()
			p, dec := newPair(t, d.options())
			r := post(t, p, "/v1/completions", complete(prompt(200, 1), 1, `,"n":2,"kv_transfer_params":`+d.ask))
			if r.status != http.StatusOK || len(p.Held()) != 2 {
				t.Fatalf("status %d, held %+v", r.status, p.Held())
			}
			want := text(t, post(t, dec, "/v1/completions", complete(prompt(200, 1), 4, `,"cache_salt":"s"`)))
			got := post(t, dec, "/v1/completions", complete(prompt(200, 1), 4, `,"n":2`+extra(t, d.tell(t, p, r))))
			if text(t, got) != want || dec.Stats().WrongPulls != 0 {
				t.Errorf("text %q, want %q, stats %+v", text(t, got), want, dec.Stats())
			}
			leaks(t, p, 1)
		})
	}
}

// TestWireKilled ends each engine in the middle of a transfer; nothing is held afterwards and the engine can start
// again.
func TestWireKilled(t *testing.T) {
	for _, d := range dialects() {
		t.Run(d.connector, func(t *testing.T) {
			t.Parallel()
			o := d.options()
			o.TransferFixed = 150 * time.Second // 1.5 s
			p, dec := newPair(t, o)
			for i, killed := range []*Engine{dec, p} {
				first := d.prefill(t, p, prompt(200, i))
				told := extra(t, d.tell(t, p, first))
				answer, _ := begin(t, dec, complete(prompt(200, i), 4, told))
				eventually(t, "transfer", func() bool { return dec.Stats().Deferred == 1 })
				killed.Kill()
				<-answer
				if err := killed.Restart(); err != nil {
					t.Fatal(err)
				}
			}
			settle(t, dec)
			settle(t, p)
			if r := post(t, dec, "/v1/completions", complete(prompt(64, 9), 1, "")); r.status != http.StatusOK {
				t.Errorf("afterwards: status %d", r.status)
			}
		})
	}
}
