// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"
)

// sglangOptions make a pair of SGLang engines whose timers of 300 s end after 300 ms.
var sglangOptions = Options{Engine: engineSGLang, NumBlocks: 400, Scale: 0.001}

// patient are the same for tests in which no timer may end.
var patient = Options{Engine: engineSGLang, NumBlocks: 400, Scale: 0.1}

// unbounded are the same where only the prefill side's timer may not end.
var unbounded = Options{Engine: engineSGLang, Connector: backendNIXL, NumBlocks: 400, Scale: 0.001}

// late is a request that runs while the test goes on.
type late struct {
	cancel context.CancelFunc
	done   chan struct{}
	reply  reply
	err    error
}

func start(t *testing.T, e *Engine, path, body string) *late {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	l := &late{cancel: cancel, done: make(chan struct{})}
	url := e.URL() + path
	go func() {
		defer close(l.done)
		l.reply, l.err = send(ctx, t, http.MethodPost, url, body)
	}()
	t.Cleanup(func() { cancel(); <-l.done })
	return l
}

// bootstraps reports whether a prefill leg is in its room and waits for its decode leg.
func bootstraps(p *Engine) bool {
	h := p.Held()
	return len(h) == 1 && h[0].State == stateBootstrap && sglangOf(p.running()).rooms.count() == 1
}

func (l *late) wait(t *testing.T) reply {
	t.Helper()
	<-l.done
	if l.err != nil {
		t.Fatal(l.err)
	}
	return l.reply
}

// roomOf are the bootstrap fields of a request.
func roomOf(p *Engine, number int64) string {
	return fmt.Sprintf(`,"bootstrap_host":"127.0.0.1","bootstrap_port":%d,"bootstrap_room":%d`, p.BootstrapPort(), number)
}

// native is a body of /generate.
func native(text string, tokens int, extra string) string {
	return fmt.Sprintf(`{"text":%s,"sampling_params":{"max_new_tokens":%d,"temperature":0}%s}`, text, tokens, extra)
}

const longText = `"` + "once upon a time there was a block of keys and values that nobody came to fetch " + `"`

// hugeRoom is not exact as a float64.
const hugeRoom = int64(9223372036854775001)

func TestSGLangRoom(t *testing.T) {
	tests := []struct {
		name, path string
		body       func(extra string) string
	}{
		{"generate", "/generate", func(x string) string { return native(longText, 6, x) }},
		{"generate, streamed", "/generate", func(x string) string { return native(longText, 6, `,"stream":true`+x) }},
		{"generate, token ids", "/generate", func(x string) string {
			return `{"input_ids":` + prompt(90, 3) + `,"sampling_params":{"max_new_tokens":5,"temperature":0}` + x + `}`
		}},
		{"generate, prompt in two blocks exactly", "/generate", func(x string) string {
			return `{"input_ids":` + prompt(32, 3) + `,"sampling_params":{"max_new_tokens":5,"temperature":0}` + x + `}`
		}},
		{"completions", "/v1/completions", func(x string) string { return complete(prompt(90, 1), 6, x) }},
		{"messages", "/v1/messages", func(x string) string {
			return `{"model":"tiny","max_tokens":6,"temperature":0,"messages":[{"role":"user","content":` + longText + `}]` + x + `}`
		}},
		{"completions, streamed", "/v1/completions", func(x string) string { return complete(prompt(90, 1), 6, `,"stream":true`+x) }},
		{"chat", "/v1/chat/completions", func(x string) string {
			return `{"model":"tiny","messages":[{"role":"user","content":` + longText + `}],"max_tokens":6,"temperature":0` + x + `}`
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p, d := newPair(t, patient)
			one := newEngine(t, Options{Engine: engineSGLang, Scale: fast})
			room := roomOf(p, hugeRoom)
			prefill := start(t, p, tt.path, tt.body(room))
			eventually(t, "the prefill leg waits", func() bool { return bootstraps(p) })
			got := post(t, d, tt.path, tt.body(room))
			first := prefill.wait(t)
			if got.status != http.StatusOK || first.status != http.StatusOK {
				t.Fatalf("status %d and %d: %s %s", first.status, got.status, first.body, got.body)
			}
			want := post(t, one, tt.path, tt.body(""))
			if textsOf(got.body) != textsOf(want.body) || textsOf(got.body) == "" {
				t.Errorf("disaggregated %q, aggregated %q", got.body, want.body)
			}
			if pulls := d.Pulls(); len(pulls) != 1 || pulls[0].Wrong || pulls[0].Err != "" || pulls[0].RequestID != strconv.FormatInt(hugeRoom, 10) {
				t.Errorf("pulls: %+v", pulls)
			}
			if n := p.Stats().GenerationTokens; n != 1 {
				t.Errorf("prefill engine generated %d tokens", n)
			}
			settle(t, p)
			if n := len(p.Leaked()) + len(d.Leaked()); n != 0 {
				t.Errorf("%d leaks", n)
			}
			if n := len(sglangOf(p.running()).rooms.open); n != 0 {
				t.Errorf("%d rooms left", n)
			}
		})
	}
}

// textsOf are the four-letter words of an answer's text: all that is generated.
func textsOf(body []byte) string {
	var b strings.Builder
	for part := range strings.SplitSeq(string(body), `"`) {
		if len(part) >= pieceBytes && len(part)%pieceBytes == 0 && part[0] == ' ' {
			b.WriteString(part + "|")
		}
	}
	return b.String()
}

func TestSGLangBatch(t *testing.T) {
	p, d := newPair(t, patient)
	port := p.BootstrapPort()
	batch := `["` + strings.Repeat("first of two ", 9) + `","` + strings.Repeat("second of two ", 9) + `"]`
	room := fmt.Sprintf(`,"rid":["r-a","r-b"],"bootstrap_host":["127.0.0.1","127.0.0.1"],"bootstrap_port":[%d,%d],"bootstrap_room":[7,%d]`, port, port, hugeRoom)
	decode := start(t, d, "/generate", native(batch, 4, room))
	eventually(t, "the decode leg waits", func() bool { return d.Stats().Deferred == 2 })
	prefill := post(t, p, "/generate", native(batch, 4, room))
	got := decode.wait(t)
	if prefill.status != http.StatusOK || got.status != http.StatusOK {
		t.Fatalf("%d %s, %d %s", prefill.status, prefill.body, got.status, got.body)
	}
	for _, want := range []string{`[{"text":" `, `"id":"r-a"`, `"id":"r-b"`, `"finish_reason":{"type":"length","length":4}`, `"completion_tokens":4`} {
		if !strings.Contains(string(got.body), want) {
			t.Errorf("no %s in %s", want, got.body)
		}
	}
	if n := d.Stats().Pulls; n != 2 {
		t.Errorf("%d pulls", n)
	}
}

func TestSGLangSeveralAnswers(t *testing.T) {
	p, d := newPair(t, patient)
	body := `{"model":"tiny","prompt":` + prompt(90, 1) + `,"max_tokens":4,"n":2` + roomOf(p, 40) + `}`
	prefill := start(t, p, "/v1/completions", body)
	got := post(t, d, "/v1/completions", body)
	if r := prefill.wait(t); r.status != http.StatusOK || got.status != http.StatusOK || d.Stats().Pulls != 2 {
		t.Errorf("%d %s, %d %s, %+v", r.status, r.body, got.status, got.body, d.Pulls())
	}
}

func TestSGLangRefusals(t *testing.T) {
	p, d := newPair(t, sglangOptions)
	tests := []struct {
		name, extra, want string
		n                 int // prompts
	}{
		{"no bootstrap fields", "", "received without bootstrap room id", 1},
		{"null room", `,"bootstrap_host":"127.0.0.1","bootstrap_port":null,"bootstrap_room":null`, "received without bootstrap room id", 1},
		{"null in an array", `,"bootstrap_room":[1,null]`, "received without bootstrap room id", 2},
		{"room is a text", `,"bootstrap_room":"seven"`, "valid integer", 1},
		{"room above int64", `,"bootstrap_room":9223372036854775808`, "valid integer", 1},
		{"room as a float", `,"bootstrap_room":1e3`, "valid integer", 1},
		{"too few rooms", `,"bootstrap_room":[1]`, "batch size", 2},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			text := `"a text"`
			if tt.n == 2 {
				text = `["a text","another"]`
			}
			for _, e := range []*Engine{p, d} {
				r := post(t, e, "/generate", native(text, 4, tt.extra))
				if r.status != http.StatusBadRequest || !strings.Contains(string(r.body), tt.want) {
					t.Errorf("%s: %d %s", e.Name(), r.status, r.body)
				}
			}
		})
	}
	r := post(t, d, "/v1/completions", complete(prompt(40, 1), 4, ""))
	if r.status != http.StatusBadRequest || !strings.HasPrefix(string(r.body), `{"object":"error","message":"Invalid request: Disaggregated request`) {
		t.Errorf("completions: %d %s", r.status, r.body)
	}
}

// TestSGLangDecodeAlone is a decode leg whose prefill leg never comes.
func TestSGLangDecodeAlone(t *testing.T) {
	t.Run("prefill failed fast", func(t *testing.T) {
		p, d := newPair(t, sglangOptions)
		if err := p.SetFaults(Faults{Rules: []Fault{{Kind: faultStatus, Status: 503}}}); err != nil {
			t.Fatal(err)
		}
		body := native(longText, 4, roomOf(p, 1))
		if r := post(t, p, "/generate", body); r.status != http.StatusServiceUnavailable {
			t.Fatalf("prefill: %d", r.status)
		}
		checkWaiting(t, d, body)
	})
	t.Run("wrong bootstrap port", func(t *testing.T) {
		p, d := newPair(t, sglangOptions)
		body := native(longText, 4, fmt.Sprintf(`,"bootstrap_host":"127.0.0.1","bootstrap_port":%d,"bootstrap_room":1`, d.Addr().Port()))
		prefill := start(t, p, "/generate", body)
		checkWaiting(t, d, body)
		if r := prefill.wait(t); r.status != http.StatusInternalServerError {
			t.Errorf("prefill: %d", r.status)
		}
	})
	t.Run("wrong host", func(t *testing.T) {
		p, d := newPair(t, sglangOptions)
		body := native(longText, 4, fmt.Sprintf(`,"bootstrap_host":"127.0.0.9","bootstrap_port":%d,"bootstrap_room":1`, p.BootstrapPort()))
		checkWaiting(t, d, body)
	})
	t.Run("prefill's client left", func(t *testing.T) {
		p, d := newPair(t, unbounded)
		body := native(longText, 4, roomOf(p, 1))
		prefill := start(t, p, "/generate", body)
		eventually(t, "the prefill leg waits", func() bool { return bootstraps(p) })
		prefill.cancel()
		settle(t, p)
		abortOf(t, p)
		if n := len(p.Leaked()); n != 0 {
			t.Errorf("%d leaks", n)
		}
		checkWaiting(t, d, body)
	})
}

// checkWaiting sends a decode leg that waits in vain, for as long as SGLang waits.
func checkWaiting(t *testing.T, d *Engine, body string) {
	t.Helper()
	began := time.Now()
	r := post(t, d, "/generate", body)
	if r.status != http.StatusInternalServerError || !strings.Contains(string(r.body), "timed out") {
		t.Errorf("decode: %d %s", r.status, r.body)
	}
	if took := time.Since(began); took < 300*time.Millisecond {
		t.Errorf("decode leg waited %v", took)
	}
	settle(t, d)
	if n := d.Stats().FailedPulls; n != 1 {
		t.Errorf("%d failed pulls", n)
	}
}

func TestSGLangPrefillEngineGone(t *testing.T) {
	t.Run("dies: two missed heartbeats fail its rooms", func(t *testing.T) {
		p, d := newPair(t, patient)
		decode := start(t, d, "/generate", native(longText, 4, roomOf(p, 1)))
		eventually(t, "the decode leg waits", func() bool { return sglangOf(p.running()).rooms.count() == 1 })
		p.Kill()
		r := decode.wait(t)
		if r.status != http.StatusInternalServerError || !strings.Contains(string(r.body), "Lost connection with prefill instance") {
			t.Errorf("decode: %d %s", r.status, r.body)
		}
	})
	t.Run("restarts: nobody notices", func(t *testing.T) {
		p, d := newPair(t, unbounded)
		prefill := start(t, p, "/generate", native(longText, 4, roomOf(p, 2)))
		eventually(t, "the prefill leg waits", func() bool { return bootstraps(p) })
		if err := p.Restart(); err != nil {
			t.Fatal(err)
		}
		<-prefill.done
		if prefill.err == nil {
			t.Errorf("prefill: %d", prefill.reply.status)
		}
		checkWaiting(t, d, native(longText, 4, roomOf(p, 2)))
		if n := len(p.Leaked()); n != 0 {
			t.Errorf("%d leaks", n)
		}
	})
}

// TestSGLangPrefillAlone is a prefill leg whose decode leg never comes.
func TestSGLangPrefillAlone(t *testing.T) {
	t.Run("Mooncake frees after its timer", func(t *testing.T) {
		p, _ := newPair(t, sglangOptions)
		r := post(t, p, "/generate", native(longText, 4, roomOf(p, 1)))
		if r.status != http.StatusInternalServerError || !strings.Contains(string(r.body), "KVPoll.Bootstrapping") {
			t.Errorf("%d %s", r.status, r.body)
		}
		settle(t, p)
		if l := p.Leaked(); len(l) != 1 || l[0].Blocks == 0 || !strings.Contains(l[0].Reason, "timed out") {
			t.Errorf("leaks: %+v", l)
		}
	})
	t.Run("NIXL holds until the leg is aborted", func(t *testing.T) {
		p, _ := newPair(t, unbounded)
		if p.timing.lease != 0 {
			t.Fatalf("timer %v", p.timing.lease)
		}
		prefill := start(t, p, "/generate", native(longText, 4, `,"rid":"one-1"`+roomOf(p, 1)))
		eventually(t, "the prefill leg waits", func() bool { return bootstraps(p) })
		if r := post(t, p, "/abort_request", `{"rid":"one-"}`); r.status != http.StatusOK {
			t.Fatalf("abort: %d", r.status)
		}
		if r := prefill.wait(t); !strings.Contains(string(r.body), `"type":"abort"`) {
			t.Errorf("prefill: %d %s", r.status, r.body)
		}
		settle(t, p)
		if n := len(p.Leaked()); n != 0 || len(p.Aborts()) != 1 || p.Aborts()[0].State != stateBootstrap {
			t.Errorf("%d leaks, aborts %+v", n, p.Aborts())
		}
	})
	t.Run("NIXL holds until a restart", func(t *testing.T) {
		p, _ := newPair(t, unbounded)
		prefill := start(t, p, "/generate", native(longText, 4, roomOf(p, 1)))
		eventually(t, "the prefill leg waits", func() bool { return bootstraps(p) })
		if err := p.Restart(); err != nil {
			t.Fatal(err)
		}
		<-prefill.done
		settle(t, p)
	})
	t.Run("the decode leg's client left before the KV came", func(t *testing.T) {
		o := patient
		o.Lease = 2 * time.Second
		p, d := newPair(t, o)
		body := native(longText, 4, roomOf(p, 1))
		decode := start(t, d, "/generate", body)
		eventually(t, "the decode leg waits", func() bool { return sglangOf(p.running()).rooms.count() == 1 })
		decode.cancel()
		settle(t, d)
		if r := post(t, p, "/generate", body); r.status != http.StatusInternalServerError {
			t.Errorf("prefill: %d %s", r.status, r.body)
		}
		if n := len(p.Leaked()); n != 1 {
			t.Errorf("%d leaks", n)
		}
	})
}

// TestSGLangLeavesBetween has one leg's client leave when both have met.
func TestSGLangLeavesBetween(t *testing.T) {
	t.Run("the decode leg, while the prefill computes", func(t *testing.T) {
		t.Parallel()
		o := patient
		o.Lease, o.PrefillFixed = 20*time.Second, 30*time.Second // 2 and 3 s
		p, d := newPair(t, o)
		body := native(longText, 4, roomOf(p, 1))
		decode := start(t, d, "/generate", body)
		eventually(t, "the decode leg waits", func() bool { return sglangOf(p.running()).rooms.count() == 1 })
		prefill := start(t, p, "/generate", body)
		eventually(t, "the prefill runs", func() bool { h := p.Held(); return len(h) == 1 && h[0].State == statePrefill })
		decode.cancel()
		settle(t, d)
		if r := prefill.wait(t); r.status != http.StatusInternalServerError || !strings.Contains(string(r.body), "KVPoll.Transferring") {
			t.Errorf("prefill: %d %s", r.status, r.body)
		}
		if l := p.Leaked(); len(l) != 1 || len(d.Leaked()) != 0 {
			t.Errorf("leaks: %+v %+v", l, d.Leaked())
		}
	})
	t.Run("the prefill leg, while the KV is copied", func(t *testing.T) {
		t.Parallel()
		o := patient
		o.TransferFixed = 20 * time.Second // 2 s
		p, d := newPair(t, o)
		body := native(longText, 4, roomOf(p, 1))
		prefill := start(t, p, "/generate", body)
		decode := start(t, d, "/generate", body)
		eventually(t, "the copy runs", func() bool { return sglangOf(p.running()).copying(1) })
		prefill.cancel()
		if r := decode.wait(t); r.status != http.StatusOK {
			t.Errorf("decode: %d %s", r.status, r.body)
		}
		settle(t, p)
		if s := d.Stats(); s.WrongPulls != 0 || s.Pulls != 1 || len(p.Leaked()) != 0 {
			t.Errorf("%+v, leaks %+v", s, p.Leaked())
		}
	})
}

// copying reports whether a room's KV is being copied.
func (w *sglangWire) copying(number int64) bool {
	w.rooms.mu.Lock()
	defer w.rooms.mu.Unlock()
	m := w.rooms.open[number]
	return m != nil && m.copying != nil
}

func TestSGLangDuplicateRoom(t *testing.T) {
	for _, kills := range []bool{false, true} {
		t.Run(fmt.Sprintf("kills=%v", kills), func(t *testing.T) {
			o := unbounded
			o.DuplicateRoomKills = kills
			p, _ := newPair(t, o)
			first := start(t, p, "/generate", native(longText, 4, roomOf(p, 5)))
			eventually(t, "the prefill leg waits", func() bool { return bootstraps(p) })
			second := post(t, p, "/generate", native(longText, 4, roomOf(p, 5)))
			if second.status != http.StatusInternalServerError {
				t.Errorf("second: %d %s", second.status, second.body)
			}
			if kills {
				checkDeath(t, p, true)
			} else if len(p.Held()) != 1 || !p.Alive() {
				t.Errorf("held: %+v", p.Held())
			}
			first.cancel()
			<-first.done
			settle(t, p)
		})
	}
}

// TestSGLangLayoutsDiffer: a decode engine does not connect to one whose KV it could not read.
func TestSGLangLayoutsDiffer(t *testing.T) {
	for want, differ := range map[string]func(*Options){
		"Page size mismatch":      func(o *Options) { o.BlockSize = 32 },
		"KV cache dtype mismatch": func(o *Options) { o.KVCacheDtype = "fp8_e4m3" },
	} {
		o := sglangOptions
		o.Peers = NewRegistry()
		o.Name, o.Role, o.BlockSize = "p", "prefill", 16
		p := newEngine(t, o)
		o.Name, o.Role = "d", "decode"
		differ(&o)
		d := newEngine(t, o)
		body := native(longText, 4, roomOf(p, 5))
		prefill := start(t, p, "/generate", body)
		r := post(t, d, "/generate", body)
		if r.status != http.StatusInternalServerError || !strings.Contains(string(r.body), want) {
			t.Errorf("%s: decode: %d %s", want, r.status, r.body)
		}
		if first := prefill.wait(t); first.status != http.StatusInternalServerError {
			t.Errorf("%s: prefill: %d", want, first.status)
		}
		settle(t, p)
		if n := len(p.Leaked()); n != 1 {
			t.Errorf("%s: %d leaks", want, n)
		}
	}
}

func TestSGLangBootstrapLabel(t *testing.T) {
	p, d := newPair(t, patient)
	if got := p.Labels()[labelBootstrapPort]; got != strconv.Itoa(p.BootstrapPort()) || got == "0" {
		t.Errorf("prefill label %q", got)
	}
	if got, ok := d.Labels()[labelBootstrapPort]; ok {
		t.Errorf("decode label %q", got)
	}
	r, err := send(t.Context(), t, http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d/health", p.BootstrapPort()), "")
	if err != nil || r.status != http.StatusOK {
		t.Errorf("bootstrap server: %v %d", err, r.status)
	}
}

// TestSGLangClientLeaves frees at once on both sides, whenever it happens.
func TestSGLangClientLeaves(t *testing.T) {
	p, d := newPair(t, Options{Engine: engineSGLang, NumBlocks: 400, Scale: 0.1, InterToken: 2 * time.Second})
	body := native(longText, 100, roomOf(p, 1))
	prefill := start(t, p, "/generate", body)
	decode := start(t, d, "/generate", body)
	if r := prefill.wait(t); r.status != http.StatusOK {
		t.Fatalf("prefill: %d %s", r.status, r.body)
	}
	eventually(t, "decoding", func() bool { h := d.Held(); return len(h) == 1 && h[0].State == stateDecode })
	decode.cancel()
	<-decode.done
	if !errors.Is(decode.err, context.Canceled) {
		t.Errorf("decode: %v", decode.err)
	}
	settle(t, d)
	abortOf(t, d)
	if len(p.Leaked())+len(d.Leaked()) != 0 {
		t.Errorf("leaks %+v %+v", p.Leaked(), d.Leaked())
	}
}

// TestSGLangStress joins, cancels and aborts many rooms at once: what is left is nothing but accounted leaks.
func TestSGLangStress(t *testing.T) {
	o := sglangOptions
	o.MaxNumSeqs = 4
	p, d := newPair(t, o)
	rng := rand.New(rand.NewPCG(1, 2))
	var legs []*late
	for i := range 60 {
		body := native(fmt.Sprintf(`"%d%s`, i, longText[1:]), 1+rng.IntN(20), fmt.Sprintf(`,"rid":"r%d-","stream":%v`, i, i%3 == 0)+roomOf(p, int64(i)))
		var pair []*late
		fate := rng.IntN(6)
		if fate != 0 {
			pair = append(pair, start(t, p, "/generate", body))
		}
		if fate != 1 {
			pair = append(pair, start(t, d, "/generate", body))
		}
		switch fate {
		case 2:
			pair[rng.IntN(2)].cancel()
		case 3:
			post(t, []*Engine{p, d}[rng.IntN(2)], "/abort_request", fmt.Sprintf(`{"rid":"r%d-"}`, i))
		}
		legs = append(legs, pair...)
	}
	for _, l := range legs {
		<-l.done
	}
	settle(t, p)
	settle(t, d)
	eventually(t, "no room left", func() bool { return sglangOf(p.running()).rooms.count() == 0 })
	if s := d.Stats(); s.Pulls == 0 || s.WrongPulls != 0 || len(d.Leaked()) != 0 {
		t.Errorf("%+v, leaks %+v", s, d.Leaked())
	}
}
