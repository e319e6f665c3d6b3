// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"net/http"
	"strings"
	"testing"
	"time"
)

// TestDecodeCannotEncodePlaceholders lets a pull fail: the decode leg has no media to compute the prompt from.
func TestDecodeCannotEncodePlaceholders(t *testing.T) {
	o := Options{Encoder: encoderNIXL, LoadFailurePolicy: policyRecompute, Role: "decode"}
	handle := `{"do_remote_prefill":true,"do_remote_decode":false,"remote_block_ids":[[1,2,3,4,5]],"remote_engine_id":"x","remote_request_id":"y",` +
		`"remote_host":"127.0.0.1","remote_port":5699,"tp_size":1}`
	for part, want := range map[string]int{embeds("ka"): http.StatusInternalServerError, keyed("a", "ka"): http.StatusOK} {
		o.Peers = NewRegistry()
		d := newEngine(t, o) // a new one, which has encoded nothing yet
		if r := ask(t, d, chat(withHandle(handle), someText, part)); r.status != want {
			t.Errorf("%s: %d %s", part, r.status, r.body)
		}
	}
}

func TestClientLeavesWhileItsMediaIsEncoded(t *testing.T) {
	e := newEngine(t, Options{Encode: time.Hour})
	l := start(t, e, "/v1/chat/completions", chat("", image("a")))
	eventually(t, "encoding", func() bool { h := e.Held(); return len(h) == 1 && h[0].State == stateEncode })
	l.cancel()
	settle(t, e)
	if a := abortOf(t, e); a.State != stateEncode || len(e.Encodings()) != 0 {
		t.Errorf("abort %+v, encodings %+v", a, e.Encodings())
	}
}

func TestPoolWithEncoders(t *testing.T) {
	p, err := NewPool(PoolOptions{Encode: 2, EncodePrefill: 1, EncodePrefillDecode: 1, Decode: 1, Template: Options{Encoder: encoderNIXL}})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range p.Engines() {
		got = append(got, e.Name()+"="+e.Role())
	}
	if want := "decode-0=decode encode-0=encode encode-1=encode encode-prefill-0=encode-prefill encode-prefill-decode-0=encode-prefill-decode"; strings.Join(got, " ") != want {
		t.Errorf("engines %v", got)
	}
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	}()
	h := encodeLeg(t, p.Engine("encode-1"), keyed("a", "ka"))
	if r := ask(t, p.Engine("encode-prefill-decode-0"), chat(withEncodings(h), embeds("ka"))); r.status != http.StatusOK {
		t.Errorf("%d %s", r.status, r.body)
	}
	for _, bad := range []Options{{Encoder: "x"}} {
		if _, err := New(bad); err == nil || !strings.Contains(err.Error(), "--encoder") {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}
