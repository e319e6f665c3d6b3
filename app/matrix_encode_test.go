// SPDX-License-Identifier: Apache-2.0

package app

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	procv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_proc/v3"

	"github.com/baton-epp/baton/internal/gatewaytest"
	"github.com/baton-epp/baton/simulate"
)

const encodeConfig = `apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- {type: file-discovery, parameters: {path: endpoints.yaml, watchFile: true}}
- {type: disagg-profile-handler, parameters: {deciders: {prefill: always-disagg-pd-decider, encode: always-disagg-multimodal-decider}}}
- {type: always-disagg-pd-decider}
- {type: always-disagg-multimodal-decider}
- {type: approx-prefix-cache-producer}
- {type: encode-filter}
- {type: prefill-filter}
- {type: decode-filter}
- {type: active-request-scorer}
- {type: max-score-picker}
dataLayer: {discovery: {pluginRef: file-discovery}}
schedulingProfiles:
- name: encode
  plugins: [{pluginRef: encode-filter}, {pluginRef: active-request-scorer}, {pluginRef: max-score-picker}]
- name: prefill
  plugins: [{pluginRef: prefill-filter}, {pluginRef: active-request-scorer}, {pluginRef: max-score-picker}]
- name: decode
  plugins: [{pluginRef: decode-filter}, {pluginRef: active-request-scorer}, {pluginRef: max-score-picker}]
disaggregation: {ecConnector: %s, encode: {timeout: %s}, %s}
scraping: {idleInterval: 200ms}
`

// encodeRow is a line of the failure matrix for the encode phase.
type encodeRow struct {
	name    string
	config  string // settings of disaggregation
	timeout string // of one encode attempt; default 10s
	faults  []simulate.Fault
	kill    int  // encode endpoints that are down
	leave   bool // the client leaves while encoders run
	prefill int  // prefill endpoints; -1 is none: decode uses the embeddings
	reasons []string
	status  int // default 200
	dropped string
	local   bool // the consumer encodes by itself
}

// encodeRows are the two items of one request through every failure of the phase. Attempts of different items may end in
// any order, so their reasons are compared sorted.
func encodeRows() []encodeRow {
	first := func(f simulate.Fault) []simulate.Fault {
		f.Phase, f.Attempt = "encode", "1"
		return []simulate.Fault{f}
	}
	always := func(f simulate.Fault) []simulate.Fault { f.Phase = "encode"; return []simulate.Fault{f} }
	both := func(reason string) []string { return []string{"ok", "ok", reason, reason} }
	return []encodeRow{
		{name: "nothing fails", reasons: []string{"ok", "ok"}},
		{name: "no prefill apart", prefill: -1, reasons: []string{"ok", "ok"}},
		{name: "encoder 500", faults: first(simulate.Fault{Kind: "status", Status: 500}), reasons: both("status_5xx")},
		{name: "encoder 429", faults: first(simulate.Fault{Kind: "status", Status: 429}), reasons: both("overloaded")},
		{name: "encoder reset", faults: first(simulate.Fault{Kind: "reset_before_headers"}), reasons: both("reset")},
		{name: "encoder hangs", timeout: "2s", faults: first(simulate.Fault{Kind: "hang"}), reasons: both("timeout")},
		{name: "encoder answers no JSON", faults: first(simulate.Fault{Kind: "status", Status: 200, Body: "<html>"}), reasons: both("malformed")},
		{
			name: "encoders used up", faults: always(simulate.Fault{Kind: "status", Status: 500}), local: true,
			reasons: slices.Repeat([]string{"status_5xx"}, 4),
		},
		{
			name: "encoders used up, no prefill apart", prefill: -1, faults: always(simulate.Fault{Kind: "status", Status: 500}), local: true,
			reasons: slices.Repeat([]string{"status_5xx"}, 4),
		},
		{name: "encoder 400", faults: always(simulate.Fault{Kind: "status", Status: 400}), local: true, reasons: []string{"rejected", "rejected"}},
		{
			name: "encoders used up, onFailure fail", config: "onFailure: fail", faults: always(simulate.Fault{Kind: "status", Status: 500}),
			status: 502, dropped: "encode-failed",
		},
		{name: "budget spent", config: "budget: 300ms", faults: always(simulate.Fault{Kind: "hang"}), status: 504, dropped: "budget-spent"},
		{name: "client gone during encode", faults: always(simulate.Fault{Kind: "delay", DelayMS: 5000}), leave: true},
		{name: "every encoder down", kill: 2, local: true},
	}
}

// TestFailureMatrixEncode is the failure matrix of the encode phase, for both encoder wires, safe and lean.
func TestFailureMatrixEncode(t *testing.T) {
	t.Parallel()
	for _, wire := range []string{"ec-example", "ec-nixl"} {
		for _, embeds := range []string{"safe", "lean"} {
			for _, r := range encodeRows() {
				for _, mode := range []procv3.ProcessingMode_BodySendMode{gatewaytest.Duplex, gatewaytest.Buffered} {
					for _, streamed := range []bool{false, true} {
						f := &flavour{name: wire + "-" + embeds}
						t.Run(cellName(f, &row{name: r.name}, mode, streamed), func(t *testing.T) {
							t.Parallel()
							encodeCell(t, wire, embeds, &r, mode, streamed)
						})
					}
				}
			}
		}
	}
}

func encodeCell(t *testing.T, wire, embeds string, r *encodeRow, mode procv3.ProcessingMode_BodySendMode, streamed bool) {
	t.Helper()
	o := fast(max(0, 2+2*r.prefill), 2)
	o.Encode, o.Template.Encoder, o.Template.Lease = 2, wire, 20*time.Second
	timeout := r.timeout
	if timeout == "" {
		timeout = "10s"
	}
	settings := "kvConnector: nixlv2"
	if r.config != "" {
		settings += ", " + r.config
	}
	text := fmt.Sprintf(encodeConfig, wire, timeout, settings)
	text = strings.Replace(text, "encode: {timeout", "encode: {embeds: "+embeds+", timeout", 1)
	s := &scenario{
		stack: newStack(t, stackOptions{noEnvoy: true, pool: o, whole: text}), id: "r", path: "/v1/chat/completions",
		body: mediaBody(streamed), streamed: streamed, mode: mode,
	}
	var err error
	if s.gateway, err = gatewaytest.New(gatewaytest.Options{Picker: s.app.Addr().String(), Request: mode}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.gateway.Close() })
	s.setFaults("encode", r.faults...)
	for _, e := range s.engines("encode")[:r.kill] {
		e.Kill()
	}
	if r.leave {
		s.leaveDuringEncode()
		return
	}
	reply, err := s.do(t.Context())
	if err != nil {
		t.Fatalf("not answered: %v", err)
	}
	status := max(r.status, 200)
	if reply.Status != status || reply.Header.Get("x-llm-d-request-dropped-reason") != r.dropped {
		t.Errorf("status %d, want %d; dropped reason %q; %.300s", reply.Status, status, reply.Header.Get("x-llm-d-request-dropped-reason"), reply.Body)
	}
	if status == 200 && (reply.Cut || answerText(t, reply.Body) == "") {
		t.Errorf("answer %.300s", reply.Body)
	}
	s.encodedAs(r, status)
	s.leftWith(want{})
	s.noPins()
}

// mediaBody asks about two images, one of which it shows twice.
func mediaBody(streamed bool) string {
	image := func(n int) string {
		return fmt.Sprintf(`{"type":"image_url","image_url":{"url":"data:image/png;base64,%s"}}`, strings.Repeat("iVBORw0KGgo"[n:n+4], 50))
	}
	return fmt.Sprintf(`{"model":"tiny","max_tokens":4,"temperature":0,"stream":%v,"messages":[{"role":"user","content":[%s,{"type":"text","text":"what is this"},%s,%s]}]}`,
		streamed, image(0), image(3), image(0))
}

// encodedAs checks attempts, order and who encoded.
func (s *scenario) encodedAs(r *encodeRow, status int) {
	s.t.Helper()
	var reasons []string
	for _, a := range s.decision(s.id).Attempts {
		if a.Phase == "encode" {
			reasons = append(reasons, a.Reason)
		}
	}
	slices.Sort(reasons)
	if want := slices.Sorted(slices.Values(r.reasons)); r.reasons != nil && !slices.Equal(reasons, want) { // rows are shared
		s.t.Errorf("encode attempts %v, want %v", reasons, want)
	}
	if status != 200 {
		return
	}
	apart, local := 0, 0
	for _, e := range s.pool.Engines() {
		for _, enc := range e.Encodings() {
			switch enc.How {
			case "encoded":
				apart++
			case "local":
				local++
			}
		}
	}
	if r.local && local == 0 || !r.local && (local != 0 || apart != 2) {
		s.t.Errorf("%d items encoded apart, %d where they are used", apart, local)
	}
}

func (s *scenario) leaveDuringEncode() {
	ctx, leave := context.WithCancel(s.t.Context())
	defer leave()
	done := s.start(ctx)
	eventually(s.t, "both items are encoded", func() bool { return s.sum("baton_sidecar_in_flight") == 2 })
	leave()
	if r := <-done; !errors.Is(r.err, context.Canceled) {
		s.t.Errorf("reply %+v, error %v", r.reply, r.err)
	}
	s.leftWith(want{})
	s.noPins()
	if n := len(s.bodies("prefill")) + len(s.bodies("decode")); n != 0 {
		s.t.Errorf("%d requests went on after the client had left", n)
	}
}

// noPins asserts that no encoder holds what somebody was to fetch.
func (s *scenario) noPins() {
	s.t.Helper()
	eventually(s.t, "no encoding pinned", func() bool {
		return !slices.ContainsFunc(s.pool.Engines(), func(e *simulate.Engine) bool { return len(e.HeldEncodings()) > 0 })
	})
}
