// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/scheduler"
	"github.com/baton-epp/baton/sidecar/connectors"
)

// asking is a blind wire with a question to decode.
type asking struct{ blind }

func (asking) Ask(x *connectors.Exchange, body *inference.Edits) bool {
	body.Set("question", []byte("true"))
	return x.Request.MaxTokens == 4
}

func (asking) Enough(_ *connectors.Exchange, answer []byte) bool {
	return bytes.Contains(answer, []byte("enough"))
}

func (asking) Withdraw(_ *connectors.Exchange, body *inference.Edits) {
	body.Set("threshold", []byte("0"))
}

// TestAskDecodeFirst: with enough in decode's cache nobody prefills; any other answer leads to a prefill.
func TestAskDecodeFirst(t *testing.T) {
	for _, c := range []struct {
		name    string
		decode  http.HandlerFunc
		reason  string
		outcome string
	}{
		{"enough", answer(`{"enough"}`), "cached", "aggregated"},
		{"not enough", answer(`{}`), "not_cached ok", "disaggregated"},
		{"failed", status(500), "status_5xx ok", "disaggregated"},
		{"rejected", status(400), "rejected ok", "disaggregated"},
		{"too long", answer(strings.Repeat(" ", 2<<20) + "enough"), "too_large ok", "disaggregated"},
		{"no time", hang, "timeout ok", "disaggregated"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := new(seen)
			r := newRig(t, func(d *config.Disaggregation) { d.Prefill.Timeout = 2 * time.Second })
			r.settings.Load().wires[""] = wire{asking{}, connectors.Traits{Name: "asking", Aggregates: true, APIs: []inference.API{inference.Completions}}}
			d := r.server("d", func(w http.ResponseWriter, req *http.Request) {
				b := got.note(req)
				if req.URL.Path != completionsPath || !strings.Contains(b, `"question":true`) || req.Header.Get(HeaderDepth) != "1" {
					t.Errorf("%s %s", req.URL, b)
				}
				c.decode(w, req)
			})
			p := r.server("p", answer("{}"))
			j := r.job(inference.Completions, clientBody, d, p)
			out := r.run(j)
			if out.Name != c.outcome || reasons(out) != c.reason || out.Attempts[0].Phase != scheduler.PhaseDecode || out.Attempts[0].Endpoint != d {
				t.Errorf("%s, %s", out.Name, reasons(out))
			}
			if n := len(out.Attempts); n > 1 && (out.Attempts[1].Number != 1 || out.Attempts[1].Phase != scheduler.PhasePrefill) {
				t.Errorf("%+v", out.Attempts)
			}
			if !strings.Contains(decodeBody(j), `"threshold":0`) || strings.Contains(decodeBody(j), "question") {
				t.Errorf("decode gets %s", decodeBody(j))
			}
			first, _, _ := strings.Cut(c.reason, " ")
			r.want(1, "attempts_total", "decode", first)
			r.want(0, "retries_total")
		})
	}
}

// TestAskOnlyWhereItMeans: without a decode endpoint, and for requests that do not ask, nobody is asked.
func TestAskOnlyWhereItMeans(t *testing.T) {
	r := newRig(t, nil)
	r.settings.Load().wires[""] = wire{asking{}, connectors.Traits{Name: "asking", Aggregates: true, APIs: []inference.API{inference.Completions}}}
	p, d := r.server("p", answer("{}")), r.server("d", answer(`{"enough"}`))
	if out := r.run(r.job(inference.Completions, clientBody, nil, p)); reasons(out) != "ok" {
		t.Errorf("%s", reasons(out))
	}
	j := r.job(inference.Completions, strings.Replace(clientBody, `"max_tokens":4`, `"max_tokens":5`, 1), d, p)
	if out := r.run(j); reasons(out) != "ok" || strings.Contains(decodeBody(j), "threshold") {
		t.Errorf("%s, %s", reasons(out), decodeBody(j))
	}
}

// TestClientLeavesDuringTheQuestion ends the request there.
func TestClientLeavesDuringTheQuestion(t *testing.T) {
	for want, budget := range map[error]time.Duration{context.Canceled: time.Minute, ErrBudgetSpent: 100 * time.Millisecond} {
		r := newRig(t, func(c *config.Disaggregation) { c.Budget = budget })
		r.settings.Load().wires[""] = wire{asking{}, connectors.Traits{Name: "asking", Aggregates: true, APIs: []inference.API{inference.Completions}}}
		ctx, leaves := contextGone(t)
		d := r.server("d", func(w http.ResponseWriter, req *http.Request) {
			if budget == time.Minute {
				leaves()
			}
			hang(w, req)
		})
		got := new(seen)
		p := r.server("p", func(_ http.ResponseWriter, req *http.Request) { got.note(req) })
		if out, err := r.Run(ctx, r.job(inference.Completions, clientBody, d, p)); !errors.Is(err, want) || out.Name != "" || got.all() != "" {
			t.Errorf("%+v, %v", out, err)
		}
		leaves()
		r.idle()
	}
}
