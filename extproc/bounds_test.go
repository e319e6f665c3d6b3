// SPDX-License-Identifier: Apache-2.0

package extproc

import (
	"bytes"
	"context"
	"errors"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"github.com/baton-epp/baton/internal/pooltest"
	"github.com/baton-epp/baton/sidecar"
)

func heapBytes() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// TestBodyIsDroppedWhenItWasSent: the gate has given the bytes back, so nothing may keep them while the response runs.
func TestBodyIsDroppedWhenItWasSent(t *testing.T) {
	k := newKit(t, kitOptions{snapshot: three()})
	const streams, size = 20, 1 << 20
	before := heapBytes()
	calls := make([]*call, streams)
	for i := range calls {
		calls[i] = k.open()
		body := []byte(`{"model":"m","kv_transfer_params":1,"messages":[{"role":"user","content":"` + strings.Repeat("x", size) + `"}]}`)
		calls[i].duplex(first{modes: modesOf(modeDuplex, modeNone), headers: []string{"x-request-id", strconv.Itoa(i)}}, body)
		calls[i].send(responseHeadersMessage("200", ""))
		calls[i].recv()
	}
	eventually(t, "bytes given back", func() bool { return k.gate.Held() == 0 })
	if grown := int64(heapBytes()) - int64(before); grown > streams*size/4 {
		t.Errorf("%d streams in the response phase keep %d bytes", streams, grown)
	}
	for _, c := range calls {
		c.cancel()
	}
}

// TestSmallChunksAreGathered: a client that sends byte by byte may not hold many times what the gate counts.
func TestSmallChunksAreGathered(t *testing.T) {
	st := &stream{}
	text := []byte(strings.Repeat("0123456789", 5000))
	for i := range text {
		st.keep(text[i : i+1])
	}
	st.keep(bytes.Repeat([]byte("L"), smallChunk))
	st.keep([]byte("tail"))
	got := bytes.Join(st.in.Body.Chunks, nil)
	if want := string(text) + strings.Repeat("L", smallChunk) + "tail"; string(got) != want || st.in.Body.Len != len(want) {
		t.Fatalf("%d bytes of %d are right: body changed", len(got), len(want))
	}
	if n := len(st.in.Body.Chunks); n > 10 {
		t.Errorf("%d chunks", n)
	}
}

func TestDribbledBodyPasses(t *testing.T) {
	k := newKit(t, kitOptions{snapshot: three()})
	chunks := make([][]byte, 0, len(chat))
	for i := range chat {
		chunks = append(chunks, []byte{chat[i]})
	}
	if _, body := k.open().duplex(first{}, chunks...); string(body) != chat {
		t.Errorf("got %s", body)
	}
}

func TestTooLargeByItsLength(t *testing.T) { // before a BUFFERED gateway sends what gRPC would refuse
	k := newKit(t, kitOptions{snapshot: three(), maxBody: 1000})
	call := k.open()
	call.send(first{modes: modesOf(modeBuffered, modeNone), headers: []string{"content-length", "1001"}}.message(t))
	if im := call.refused(); im.GetStatus().GetCode() != 413 {
		t.Errorf("status %v", im.GetStatus().GetCode())
	}
}

func TestBodyWithoutHeadersIsRefused(t *testing.T) { // request_header_mode SKIP: nothing can be inspected or picked
	k := newKit(t, kitOptions{snapshot: three()})
	call := k.open()
	call.send(bodyMessage([]byte(`{"kv_transfer_params":{}}`), true))
	if im := call.refused(); im.GetStatus().GetCode() != 500 || im.GetDetails() != "body-mode-unsafe" {
		t.Errorf("status %v, %s", im.GetStatus().GetCode(), im.GetDetails())
	}
}

func TestCutAnswersHeldRequests(t *testing.T) { // docs/design.md 5.3: never a bare gRPC error for what can be answered
	entered := make(chan struct{})
	k := newKit(t, kitOptions{snapshot: three(), config: prefillConfig, orchestrat: &scripted{run: func(ctx context.Context, _ *sidecar.Job) (*sidecar.Outcome, error) {
		close(entered)
		<-ctx.Done()
		return nil, ctx.Err()
	}}})
	k.snapshot = pooltest.Snapshot(pooltest.E("p").Role("prefill"), pooltest.E("d").Role("decode"))
	call := k.open()
	call.send(first{}.message(t))
	call.send(bodyMessage([]byte(chat), true))
	<-entered
	k.server.Cut()
	if im := call.refused(); im.GetStatus().GetCode() != 503 || im.GetDetails() != "rejected-shutting-down" {
		t.Errorf("status %v, %s", im.GetStatus().GetCode(), im.GetDetails())
	}
}

const prefillConfig = `
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- {type: disagg-profile-handler, parameters: {deciders: {prefill: always-disagg-pd-decider}}}
- {type: always-disagg-pd-decider}
- {type: prefill-filter}
- {type: decode-filter}
- {type: max-score-picker}
schedulingProfiles:
- name: prefill
  plugins: [{pluginRef: prefill-filter}, {pluginRef: max-score-picker}]
- name: decode
  plugins: [{pluginRef: decode-filter}, {pluginRef: max-score-picker}]
`

func TestPanicInTheResponseCutsTheStream(t *testing.T) { // with OK the gateway would take the response to be complete
	for mode, want := range map[string]bool{"bodies": true, "quiet": false} {
		st := &stream{server: newKit(t, kitOptions{snapshot: three()}).server, requestOver: true, responseMode: modeDuplex}
		if mode == "quiet" {
			st.responseMode = modeNone
		}
		if err := st.recovered(errors.New("bug"), nil); (err != nil) != want {
			t.Errorf("%s: %v", mode, err)
		}
	}
}
