// SPDX-License-Identifier: Apache-2.0

package extproc

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"
	"testing"

	procv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_proc/v3"
	extprocv3 "github.com/envoyproxy/go-control-plane/envoy/service/ext_proc/v3"

	"github.com/baton-epp/baton/internal/pooltest"
	"github.com/baton-epp/baton/pool"
)

const chat = `{"model":"m","messages":[{"role":"user","content":"hello"}]}`

// three is the pool of the hermetic table: one endpoint is clearly the least loaded.
func three() *pool.Snapshot {
	return pooltest.Snapshot(pooltest.E("a").Waiting(3).KV(.2), pooltest.E("b").KV(.1), pooltest.E("c").Waiting(10).KV(.2))
}

func TestPickInHeaderAndMetadata(t *testing.T) { // P1, P6, P7, P8, P10
	k := newKit(t, kitOptions{snapshot: three()})
	for name, modes := range map[string]first{
		"announced":     {modes: modesOf(modeDuplex, modeDuplex)},
		"not announced": {},
	} {
		t.Run(name, func(t *testing.T) {
			p, body := k.open().duplex(modes, []byte(chat))
			if p.header != "192.168.1.2:8000" || p.metadata != p.header {
				t.Errorf("header %q, metadata %q, want both 192.168.1.2:8000", p.header, p.metadata)
			}
			if string(body) != chat {
				t.Errorf("body changed: %s", body)
			}
			if slices.Contains(p.removed, "content-length") {
				t.Error("content-length removed although the body is the same")
			}
		})
	}
}

func TestIPv6DestinationIsBracketed(t *testing.T) { // P8
	k := newKit(t, kitOptions{snapshot: pooltest.Snapshot(pooltest.E("a").Addr("[fd00::1]:8000"))})
	if p, _ := k.open().duplex(first{over: true, method: "GET", path: "/v1/models"}); p.header != "[fd00::1]:8000" {
		t.Errorf("got %q", p.header)
	}
}

func TestSubset(t *testing.T) { // P3, P4, P5
	k := newKit(t, kitOptions{snapshot: three()})
	for _, c := range []struct {
		name   string
		subset any
		want   string // "" = 503
	}{
		{"list", []any{"192.168.1.1:8000", "192.168.1.3:8000"}, "192.168.1.1:8000"},
		{"string", "192.168.1.3:8000, 192.168.1.9:1", "192.168.1.3:8000"},
		{"wrong port", []any{"192.168.1.2:9999"}, ""},
		{"empty list", []any{}, ""},
		{"empty string", "", ""},
		{"a number", 5, ""},
		{"not addresses", []any{"pod-a", "192.168.1.1"}, ""},
		{"foreign", []any{"10.0.0.1:8000"}, ""},
	} {
		for _, over := range []bool{false, true} {
			t.Run(c.name, func(t *testing.T) {
				f := first{subset: c.subset, over: over}
				if over {
					f.method, f.path = "GET", "/v1/models"
				}
				if c.want != "" {
					if p, _ := k.open().duplex(f, []byte(chat)); p.header != c.want {
						t.Errorf("got %q, want %q", p.header, c.want)
					}
					return
				}
				call := k.open()
				call.send(f.message(t))
				if !over {
					call.send(bodyMessage([]byte(chat), true))
				}
				if im := call.refused(); im.GetStatus().GetCode() != 503 {
					t.Errorf("status %v, want 503", im.GetStatus().GetCode())
				}
			})
		}
	}
	t.Run("switched off", func(t *testing.T) {
		k := newKit(t, kitOptions{snapshot: three(), noSubset: true})
		if p, _ := k.open().duplex(first{subset: []any{}}, []byte(chat)); p.header == "" {
			t.Error("the hint was obeyed")
		}
	})
}

func TestRefusals(t *testing.T) { // P12, docs/design.md 3.5 and 3.6
	full := three()
	for _, c := range []struct {
		name     string
		options  kitOptions
		first    first
		body     string
		code     int
		reason   string
		contains string
	}{
		{"empty pool", kitOptions{snapshot: pooltest.Snapshot()}, first{}, chat, 503, "rejected-no-endpoints", `"code":503`},
		{"empty pool, GET", kitOptions{snapshot: pooltest.Snapshot()}, first{over: true, method: "GET", path: "/v1/models"}, "", 503, "rejected-no-endpoints", ""},
		{"empty pool, Anthropic", kitOptions{snapshot: pooltest.Snapshot()}, first{path: "/v1/messages"}, chat, 503, "rejected-no-endpoints", `{"type":"error","error":{"type":"overloaded_error"`},
		{"model missing, checked before the pool", kitOptions{snapshot: pooltest.Snapshot()}, first{}, `{"hello":"world"}`, 400, "malformed-body", "model is missing"},
		{"not JSON", kitOptions{snapshot: full}, first{}, "no healthy upstream", 400, "malformed-body", "BadRequestError"},
		{"JSON array", kitOptions{snapshot: full}, first{}, "[]", 400, "malformed-body", ""},
		{"query does not hide the path", kitOptions{snapshot: full}, first{path: "/v1/chat/completions?a=b"}, "[]", 400, "malformed-body", ""},
		{"doubled and trailing slashes", kitOptions{snapshot: full}, first{path: "//v1///chat//completions//"}, "[]", 400, "malformed-body", ""},
		{"escaped path", kitOptions{snapshot: full}, first{path: "/v1/%63hat%2Fcompletions"}, "[]", 400, "malformed-body", ""},
		{"UTF-16", kitOptions{snapshot: full}, first{}, "\xff\xfe{\x00}\x00", 400, "malformed-body", ""},
		{"UTF-16 on an unknown path", kitOptions{snapshot: full}, first{path: "/invented", headers: []string{"content-type", "text/plain"}}, "\xff\xfe{\x00}\x00", 400, "malformed-body", ""},
		{"compressed", kitOptions{snapshot: full}, first{headers: []string{"content-encoding", "gzip"}}, "\x1f\x8b\x08", 415, "unsupported-encoding", ""},
		{"JSON of an unknown path must parse", kitOptions{snapshot: full}, first{path: "/other"}, "{", 400, "malformed-body", ""},
		{"too large", kitOptions{snapshot: full, maxBody: 10}, first{}, chat, 413, "body-too-large", "limits.maxBodyBytes"},
		{"over the budget of all", kitOptions{snapshot: full, maxHeld: 10}, first{}, chat, 429, "rejected-saturated", "limits.maxHeldBytes"},
		{"body mode NONE", kitOptions{snapshot: full}, first{modes: modesOf(modeNone, modeNone)}, "", 500, "body-mode-unsafe", "FULL_DUPLEX_STREAMED"},
		{"body mode STREAMED", kitOptions{snapshot: full}, first{modes: modesOf(modeStreamed, modeNone)}, "", 500, "body-mode-unsafe", ""},
		{"body mode BUFFERED_PARTIAL", kitOptions{snapshot: full}, first{modes: modesOf(procv3.ProcessingMode_BUFFERED_PARTIAL, modeNone)}, "", 500, "body-mode-unsafe", ""},
		{"our own sub-request", kitOptions{snapshot: full}, first{headers: []string{"x-baton-depth", "1"}}, chat, 508, "loop-detected", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			k := newKit(t, c.options)
			call := k.open()
			call.send(c.first.message(t))
			if c.body != "" {
				call.send(bodyMessage([]byte(c.body), true))
			}
			im := call.refused()
			if got := int(im.GetStatus().GetCode()); got != c.code {
				t.Errorf("status %d, want %d", got, c.code)
			}
			set := map[string]string{}
			for _, o := range im.GetHeaders().GetSetHeaders() {
				set[o.GetHeader().GetKey()] = headerValue(o.GetHeader())
			}
			if set[HeaderReason] != c.reason || set["content-type"] != "application/json" {
				t.Errorf("headers %v, want reason %s", set, c.reason)
			}
			if (c.code == 429) != (set["retry-after"] != "") {
				t.Errorf("retry-after %q", set["retry-after"])
			}
			if !json.Valid(im.GetBody()) || !strings.Contains(string(im.GetBody()), c.contains) {
				t.Errorf("body %s, want JSON with %s", im.GetBody(), c.contains)
			}
			if held := k.gate.Held(); held != 0 {
				t.Errorf("%d bytes still held", held)
			}
		})
	}
}

func TestControlHeadersOfTheClientAreRemoved(t *testing.T) { // docs/design.md 3.6
	k := newKit(t, kitOptions{snapshot: three()})
	p, _ := k.open().duplex(first{headers: []string{
		HeaderDestination, "6.6.6.6:1", "x-prefiller-host-port", "6.6.6.6:2", "x-encoder-hosts-ports", "6.6.6.6:3",
		"x-kv-cache-source-host-port", "6.6.6.6:4", "x-data-parallel-host-port", "6.6.6.6:5", "x-processor-attempt", "9", "x-request-id", "r1",
	}}, []byte(chat))
	for _, name := range []string{"x-prefiller-host-port", "x-encoder-hosts-ports", "x-kv-cache-source-host-port", "x-data-parallel-host-port", "x-processor-attempt"} {
		if !slices.Contains(p.removed, name) {
			t.Errorf("%s stays on the request", name)
		}
	}
	if p.header != "192.168.1.2:8000" {
		t.Errorf("destination %q", p.header)
	}
	if _, set := p.set["x-request-id"]; set {
		t.Error("the client's x-request-id was set again")
	}
}

func TestRequestIDIsMade(t *testing.T) {
	k := newKit(t, kitOptions{snapshot: three()})
	if p, _ := k.open().duplex(first{}, []byte(chat)); len(p.set["x-request-id"]) != 36 {
		t.Errorf("x-request-id %q, want a UUID", p.set["x-request-id"])
	}
}

func TestTransferFieldsAreStripped(t *testing.T) { // docs/design.md 3.6: one of them ends a decode server's process
	k := newKit(t, kitOptions{snapshot: three()})
	for _, c := range []struct{ name, path, contentType, body, want string }{
		{"top level", "/v1/chat/completions", "application/json", `{"model":"m","kv_transfer_params":{"do_remote_prefill":true},"messages":[]}`, `{"model":"m","messages":[]}`},
		{"first", "/v1/completions", "application/json", `{"kv_transfer_params":{"do_remote_prefill":true},"model":"m"}`, `{"model":"m"}`},
		{"last", "/v1/completions", "application/json", `{"model":"m","ec_transfer_params":1}`, `{"model":"m"}`},
		{"escaped key", "/v1/completions", "application/json", `{"model":"m","\u006bv_transfer_params":{}}`, `{"model":"m"}`},
		{"duplicates", "/v1/completions", "application/json", `{"kv_transfer_params":1,"model":"m","kv_transfer_params":2}`, `{"model":"m"}`},
		{"bootstrap", "/v1/completions", "application/json", `{"bootstrap_host":"h","model":"m","bootstrap_room":1}`, `{"model":"m"}`},
		{"unknown path", "/v1/chat/completions/render", "application/json", `{"a":1,"kv_transfer_params":{}}`, `{"a":1}`},
		{"unknown path, text", "/invented", "text/plain", `{"a":1,"kv_transfer_params":{}}`, `{"a":1}`},
	} {
		t.Run(c.name, func(t *testing.T) {
			p, body := k.open().duplex(first{path: c.path, headers: []string{"content-type", c.contentType, "content-length", "9"}}, []byte(c.body))
			if strings.ReplaceAll(string(body), " ", "") != c.want {
				t.Errorf("got %s, want %s", body, c.want)
			}
			if !slices.Contains(p.removed, "content-length") {
				t.Error("content-length stays on a changed body: request smuggling")
			}
		})
	}
}

func TestBodiesPassAsTheyCame(t *testing.T) {
	k := newKit(t, kitOptions{snapshot: three()})
	big := []byte(`{"model":"m","messages":[{"role":"user","content":"` + strings.Repeat("0123456789abcdef", 5<<16) + `"}]}`)
	for _, size := range []int{1, 1000, 62000, 1 << 20} {
		body := big
		if size == 1 {
			body = []byte(chat)
		}
		_, got := k.open().duplex(first{}, slices.Collect(slices.Chunk(body, size))...)
		if !bytes.Equal(got, body) {
			t.Errorf("chunks of %d bytes: body changed", size)
		}
	}
	if _, got := k.open().duplex(first{path: "/v1/audio/transcriptions", headers: []string{"content-type", "multipart/form-data; boundary=x"}}, []byte("--x\r\n\x00\x01")); string(got) != "--x\r\n\x00\x01" {
		t.Errorf("multipart body changed: %q", got)
	}
}

func TestBodyEndedByTrailers(t *testing.T) { // measured on Envoy 1.40: end_of_stream with trailers hangs the request
	k := newKit(t, kitOptions{snapshot: three()})
	call := k.open()
	call.send(first{modes: modesOf(modeDuplex, modeNone)}.message(t))
	call.send(bodyMessage([]byte(chat), false))
	call.send(&extprocv3.ProcessingRequest{Request: &extprocv3.ProcessingRequest_RequestTrailers{RequestTrailers: &extprocv3.HttpTrailers{}}})
	if call.recv().GetRequestHeaders() == nil {
		t.Fatal("want the header answer")
	}
	s := call.recv().GetRequestBody().GetResponse().GetBodyMutation().GetStreamedResponse()
	if string(s.GetBody()) != chat || s.GetEndOfStream() {
		t.Errorf("body %q, end of stream %v", s.GetBody(), s.GetEndOfStream())
	}
	if call.recv().GetRequestTrailers() == nil {
		t.Error("want the trailers answer")
	}
}

func TestBufferedMode(t *testing.T) {
	k := newKit(t, kitOptions{snapshot: three()})
	for _, c := range []struct{ name, body, want string }{
		{"unchanged", chat, ""},
		{"stripped", `{"model":"m","kv_transfer_params":{}}`, `{"model":"m"}`},
	} {
		t.Run(c.name, func(t *testing.T) {
			call := k.open()
			call.send(first{modes: modesOf(modeBuffered, modeNone), path: "/v1/completions"}.message(t))
			if m := call.recv(); m.GetRequestHeaders() == nil || m.GetDynamicMetadata() != nil {
				t.Fatalf("want the headers to pass at once, got %v", m)
			}
			call.send(bodyMessage([]byte(c.body), true))
			m := call.recv()
			p := readMutation(t, m, m.GetRequestBody().GetResponse())
			if p.header != "192.168.1.2:8000" || p.metadata != p.header {
				t.Errorf("header %q, metadata %q", p.header, p.metadata)
			}
			if p.replaced != (c.want != "") || string(p.body) != c.want {
				t.Errorf("body %q, want %q", p.body, c.want)
			}
			if length := p.set["content-length"]; p.replaced && length != "13" {
				t.Errorf("content-length %q, want the exact one", length)
			}
		})
	}
}

func TestUninspectedBodiesWhereAllowed(t *testing.T) {
	k := newKit(t, kitOptions{snapshot: three(), uninspect: true})
	call := k.open()
	call.send(first{modes: modesOf(modeStreamed, modeNone)}.message(t))
	m := call.recv()
	if p := readMutation(t, m, m.GetRequestHeaders().GetResponse()); p.header != "192.168.1.2:8000" {
		t.Errorf("destination %q", p.header)
	}
	call.send(bodyMessage([]byte("anything"), true))
	if call.recv().GetRequestBody() == nil {
		t.Error("want the chunk to pass")
	}
}
