// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
)

// TestEncodeThenPrefill: every item is encoded before the prompt is prefilled where the embeddings are used; decode only
// learns what there is to count.
func TestEncodeThenPrefill(t *testing.T) {
	r := newEncodeRig(newRig(t, nil))
	encoders := list(r.encodeServer("e0", nil), r.encodeServer("e1", nil))
	p := r.server("p", r.record("p", answer(goodAnswer)))
	d := r.add("d", "decode", "10.9.9.9:8000")
	d.Sidecar = pool.SidecarAbsent
	j := r.encodeJob(images("a", "b", "c", "a"), d, encoders, list(p))
	j.Request.Headers = inference.Headers{{Name: "authorization", Value: "Bearer k"}, {Name: "traceparent", Value: "00-x"}, {Name: "cookie", Value: "no"}}
	j.Model = "tiny-v2"
	out := r.run(j)

	log := r.got()
	ids := []string{}
	for _, leg := range log[:len(log)-1] {
		if leg.at == "p" || leg.path != "/v1/chat/completions" || !strings.Contains(leg.body, `"model":"tiny-v2"`) {
			t.Errorf("encode leg at %s to %s: %s", leg.at, leg.path, leg.body)
		}
		ids = append(ids, leg.header.Get("X-Request-Id"))
		for name, want := range map[string]string{"Authorization": "Bearer k", "X-Processor-Attempt": "1", "X-Baton-Depth": "1", "Traceparent": "00-x", "Cookie": ""} {
			if got := leg.header.Get(name); got != want {
				t.Errorf("%s: %q, want %q", name, got, want)
			}
		}
	}
	slices.Sort(ids)
	if diff := cmp.Diff([]string{"req-1-enc-0", "req-1-enc-1", "req-1-enc-2"}, ids); diff != "" {
		t.Error(diff)
	}
	last := log[len(log)-1]
	if last.at != "p" || last.header.Get("X-Request-Id") != "req-1" {
		t.Fatalf("last came %s as %s", last.at, last.header.Get("X-Request-Id"))
	}
	prefilled, decoded := splicedInto(last.body), splicedInto(decodeBody(j))
	if prefilled == nil || decoded == nil || !prefilled.Consumer || decoded.Consumer || slices.Contains(prefilled.Handles, "") ||
		prefilled.Handles[0] != prefilled.Handles[3] {
		t.Errorf("prefill got %+v, decode %+v", prefilled, decoded)
	}
	if out.Name != outcomeDisaggregated || len(out.Attempts) != 4 || out.EncodeTime <= 0 || out.EncodeReason != "" {
		t.Errorf("%s, %s, %v, %q", out.Name, reasons(out), out.EncodeTime, out.EncodeReason)
	}
	var header string
	for _, h := range out.Headers {
		if h.Name == HeaderEncoders {
			header = h.Value
		}
	}
	if header != out.encoderHosts() || header == "" {
		t.Errorf("headers %v, encoders %s", out.Headers, out.encoderHosts())
	}
	r.want(3, "encode_items_total", itemEncoded)
	r.want(1, "encode_items_total", itemDeduplicated)
	r.want(3, "attempts_total", "encode", reasonOK)
	r.want(1, "phase_duration_seconds", "encode")
	r.want(1, "checkpoints_total", "ENCODE_COMPLETE")
}

// TestEncodeOnce: what is the same in every respect is encoded once.
func TestEncodeOnce(t *testing.T) {
	f := func(name string, want int, parts ...string) {
		t.Helper()
		r := newEncodeRig(newRig(t, nil))
		e := r.encodeServer("e", nil)
		j := r.encodeJob(chat(parts...), r.add("d", "decode", "10.9.9.9:8000"), list(e), nil)
		r.run(j)
		if got := len(r.got()); got != want {
			t.Errorf("%s: %d items encoded, want %d", name, got, want)
		}
		s := splicedInto(decodeBody(j))
		if s == nil || !s.Consumer || len(s.Handles) != len(parts) || slices.Contains(s.Handles, "") {
			t.Errorf("%s: %+v", name, s)
		}
	}
	image := `{"type":"image_url","image_url":{"url":"u"}}`
	f("equal", 1, image, image, image)
	f("another detail", 2, image, `{"type":"image_url","image_url":{"url":"u","detail":"low"}}`)
	f("another name beside it", 2, image, `{"type":"image_url","image_url":{"url":"u"},"uuid":"v"}`)
	f("another kind", 2, image, `{"type":"video_url","video_url":{"url":"u"}}`)
}

// TestEncodeAffinity: the same content goes to the same endpoint whatever the order of the ranking, and one that leaves
// moves its own items only.
func TestEncodeAffinity(t *testing.T) {
	r := newEncodeRig(newRig(t, nil))
	var encoders []*pool.Endpoint
	for i := range 4 {
		encoders = append(encoders, r.encodeServer(fmt.Sprintf("e%d", i), nil))
	}
	d := r.add("d", "decode", "10.9.9.9:8000")
	var names []string
	for i := range 64 {
		names = append(names, fmt.Sprintf("image-%d", i))
	}
	where := func() map[string]string {
		r.run(r.encodeJob(images(names...), d, encoders, nil))
		out := map[string]string{}
		for _, leg := range r.got() {
			out[leg.body] = leg.at
		}
		return out
	}
	first := where()
	slices.Reverse(encoders)
	if diff := cmp.Diff(first, where()); diff != "" {
		t.Errorf("another ranking: %s", diff)
	}
	gone := encoders[1]
	r.drop(gone)
	counts := map[string]int{}
	for item, at := range where() {
		counts[first[item]]++
		if first[item] != at && first[item] != gone.Name {
			t.Errorf("an item moved from %s to %s when %s left", first[item], at, gone.Name)
		}
	}
	if len(first) != len(names) || len(counts) != 4 {
		t.Errorf("%d items, by endpoint %v", len(first), counts)
	}
}

// TestEncodeSpreads: endpoints get about the same number of items.
func TestEncodeSpreads(t *testing.T) {
	homes := make([]home, 10)
	for i := range homes {
		homes[i].hash = mix(uint64(i))
	}
	counts := make([]int, len(homes))
	for i := range 10000 {
		counts[best(homes, mix(uint64(i)<<20), nil)]++
	}
	for i, n := range counts {
		if n < 850 || n > 1150 {
			t.Errorf("endpoint %d gets %d of 10,000 items", i, n)
		}
	}
}

// TestEncodeParallel bounds the legs of one request.
func TestEncodeParallel(t *testing.T) {
	r := newEncodeRig(newRig(t, func(c *config.Disaggregation) { c.Encode.Parallel = 3 }))
	var mu sync.Mutex
	now, most := 0, 0
	full := make(chan struct{})
	e := r.encodeServer("e", func(w http.ResponseWriter, req *http.Request) {
		mu.Lock()
		now++
		if most = max(most, now); now == 3 && most == 3 {
			select {
			case <-full:
			default:
				close(full)
			}
		}
		mu.Unlock()
		<-full // until three are there at once
		mu.Lock()
		now--
		mu.Unlock()
		answer(`{"handle":"h"}`)(w, req)
	})
	r.run(r.encodeJob(images("a", "b", "c", "d", "e", "f", "g", "h"), r.add("d", "decode", "10.9.9.9:8000"), list(e), nil))
	if most != 3 {
		t.Errorf("%d legs at once, want 3", most)
	}
	r.want(8, "encode_items_total", itemEncoded)
}

// TestEncodeShapes: who uses embeddings and can make them needs nobody else (docs/design.md 3.1).
func TestEncodeShapes(t *testing.T) {
	const e, p, d = pool.RoleEncode, pool.RolePrefill, pool.RoleDecode
	f := func(shape string, encoder, prefill, decode pool.Role, wantLegs string, wantReason string) {
		t.Helper()
		r := newEncodeRig(newRig(t, nil))
		var encoders, prefillers []*pool.Endpoint
		if encoder != 0 {
			encoders = list(as(encoder, r.encodeServer("e", nil)))
		}
		if prefill != 0 {
			prefillers = list(as(prefill, r.server("p", r.record("p", answer(goodAnswer)))))
		}
		decoder := as(decode, r.add("d", "decode", "10.9.9.9:8000"))
		j := r.encodeJob(images("a"), decoder, encoders, prefillers)
		out := r.run(j)
		var legs []string
		for _, leg := range r.got() {
			legs = append(legs, leg.at)
		}
		if got := strings.Join(legs, " "); got != wantLegs || out.EncodeReason != wantReason {
			t.Errorf("%s: legs %q, want %q, %q", shape, got, wantLegs, out.EncodeReason)
		}
		if spliced := splicedInto(decodeBody(j)) != nil; spliced != strings.Contains(wantLegs, "e") {
			t.Errorf("%s: %s", shape, decodeBody(j))
		}
	}
	f("E/P/D", e, p, d, "e p", "")
	f("E/PD", e, 0, p|d, "e", "")
	f("EP/D", e|p, e|p, d, "p", localPrefill)
	f("E/PD in one", e|p|d, 0, e|p|d, "", localDecode)
	f("P/D", 0, p, d, "p", "")
	f("aggregated", 0, 0, 0, "", "")
	f("E/P/D whose decode could encode", e, p, e|p|d, "e p", "")
}

// TestEncodeModes: only what orchestrates sends anything; a sidecar is told the homes of the items.
func TestEncodeModes(t *testing.T) {
	f := func(name, mode string, sidecar pool.Sidecar, connector bool, wantLegs int, wantHosts int, wantReason string) {
		t.Helper()
		r := newEncodeRig(newRig(t, modeOf(mode)))
		if !connector {
			s := *r.settings.Load()
			s.encoder = encoder{}
			r.settings.Store(&s)
		}
		encoders := list(r.encodeServer("e0", nil), r.encodeServer("e1", nil), r.encodeServer("e2", nil))
		d := r.add("d", "decode", "10.9.9.9:8000")
		d.Sidecar = sidecar
		out := r.run(r.encodeJob(images("a", "a"), d, encoders, nil))
		if legs := len(r.got()); legs != wantLegs || len(out.Encoders) != wantHosts || out.EncodeReason != wantReason {
			t.Errorf("%s: %d legs, encoders %s, %q", name, legs, out.encoderHosts(), out.EncodeReason)
		}
		var hosts string
		for _, h := range out.Headers {
			if h.Name == HeaderEncoders {
				hosts = h.Value
			}
		}
		named := wantHosts > 0 && (wantLegs == 0 || sidecar == pool.SidecarAbsent || mode == modeOrchestrate)
		if named != (hosts != "") || named && hosts != out.encoderHosts() {
			t.Errorf("%s: header %q", name, hosts)
		}
	}
	f("orchestrate", modeOrchestrate, pool.SidecarUnknown, true, 1, 1, "")
	f("orchestrate without connector", modeOrchestrate, pool.SidecarUnknown, false, 0, 0, localNoConnector)
	f("auto, no sidecar", modeAuto, pool.SidecarAbsent, true, 1, 1, "")
	f("auto, not known", modeAuto, pool.SidecarUnknown, true, 1, 1, "")
	f("auto, sidecar", modeAuto, pool.SidecarPresent, true, 0, 1, "")
	f("auto, sidecar, no connector", modeAuto, pool.SidecarPresent, false, 0, 1, "")
	f("headers", modeHeaders, pool.SidecarUnknown, false, 0, 1, "")
	f("off", modeOff, pool.SidecarUnknown, true, 0, 0, "")
}

// TestEncodeStartsAtZero: every series of the phase exists from the start.
func TestEncodeStartsAtZero(t *testing.T) {
	r := newRig(t, nil)
	for _, reason := range Reasons() {
		r.want(0, "attempts_total", "encode", reason)
	}
	for _, result := range []string{itemEncoded, itemDeduplicated, itemLocal, itemSkipped, itemFailed} {
		r.want(0, "encode_items_total", result)
	}
	families, err := r.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	series := 0
	for _, f := range families {
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if l.GetValue() == "encode" || l.GetValue() == "ENCODE_COMPLETE" {
					series++
				}
			}
		}
	}
	if want := len(Reasons()) + 5; series != want { // attempts; duration, in flight, sent, received, checkpoint
		t.Errorf("%d series of the encode phase, want %d", series, want)
	}
}

// TestEncodes: the scheduler is asked for encoders only where somebody could use them.
func TestEncodes(t *testing.T) {
	for mode, want := range map[string]bool{modeOrchestrate: false, modeAuto: true, modeHeaders: true, modeOff: false} {
		r := newRig(t, modeOf(mode))
		if r.Encodes() != want {
			t.Errorf("mode %s without a connector: %v", mode, r.Encodes())
		}
		if newEncodeRig(r).Encodes() != (mode != modeOff) {
			t.Errorf("mode %s with a connector: %v", mode, r.Encodes())
		}
	}
}

// TestEncodedMediaIsNotKept: a response may take minutes, in which the client's bytes and the handles are of no use.
func TestEncodedMediaIsNotKept(t *testing.T) {
	r := newEncodeRig(newRig(t, nil))
	encoders := list(r.encodeServer("e0", nil))
	d := r.add("d", "decode", "10.9.9.9:8000")
	j := r.encodeJob(images("a", "b"), d, encoders, list(r.server("p", answer(goodAnswer))))
	out := r.run(j)
	if out.encoding == nil {
		t.Fatal("nothing was encoded")
	}
	for i := range out.encoding.items {
		if body := out.encoding.items[i].body; body.Len != 0 || body.Chunks != nil {
			t.Errorf("item %d keeps %d bytes", i, body.Len)
		}
	}
	out.ForgetBody()
	if out.encoding != nil {
		t.Error("the handles are kept")
	}
	(*Outcome)(nil).ForgetBody()
}
