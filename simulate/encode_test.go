// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// image is a content part; name tells images apart.
func image(name string) string {
	return `{"type":"image_url","image_url":{"url":"http://x/` + name + `.png"}}`
}

func keyed(name, uuid string) string {
	return `{"uuid":"` + uuid + `",` + image(name)[1:]
}

func embeds(uuid string) string {
	return `{"type":"image_embeds","image_embeds":{"image_grid_thw":[[1,16,16]]},"uuid":"` + uuid + `"}`
}

func chat(extra string, parts ...string) string {
	return `{"model":"tiny","max_tokens":4,"temperature":0,"messages":[{"role":"user","content":[` + strings.Join(parts, ",") + `]}]` + extra + `}`
}

const someText = `{"type":"text","text":"what is this, and what else is there to see?"}`

// newEncoders starts an encoder and a consumer of that scale that know each other. The encoder keeps what it pinned for
// 30 s of real time.
func newEncoders(t *testing.T, connector string, scale float64) (enc, use *Engine) {
	t.Helper()
	o := Options{Peers: NewRegistry(), Encoder: connector, Seed: 3}
	o.Name, o.Role, o.Scale = "e", roleEncode, 1
	enc = newEngine(t, o)
	o.Name, o.Role, o.Scale = "pd", "prefill-decode", scale
	use = newEngine(t, o)
	return enc, use
}

// endPins ends the time of everything that is pinned.
func endPins(e *Engine) {
	p := e.running()
	if p == nil {
		return
	}
	for _, q := range p.ranks {
		q.enc.mu.Lock()
		for _, list := range q.enc.pins {
			for _, one := range list {
				one.timer.Reset(0)
			}
		}
		q.enc.mu.Unlock()
	}
}

// encodeLeg sends items to an encoder and returns ec_transfer_params.
func encodeLeg(t *testing.T, e *Engine, parts ...string) string {
	t.Helper()
	r := post(t, e, "/v1/chat/completions", chat("", parts...))
	var v struct {
		EC    json.RawMessage `json:"ec_transfer_params"`
		Usage struct {
			Completion int `json:"completion_tokens"`
		}
	}
	if err := json.Unmarshal(r.body, &v); err != nil || r.status != http.StatusOK || v.Usage.Completion != 1 {
		t.Fatalf("encode leg: %d %s", r.status, r.body)
	}
	return string(v.EC)
}

func withEncodings(h string) string { return `,"ec_transfer_params":` + h }

func ask(t *testing.T, e *Engine, body string) reply {
	t.Helper()
	return post(t, e, "/v1/chat/completions", body)
}

// hows lists how an engine's media came.
func hows(e *Engine) string {
	var out []string
	for _, x := range e.Encodings() {
		out = append(out, x.How+"<"+x.From)
	}
	return strings.Join(out, " ")
}

func TestMediaTakesPlaceholders(t *testing.T) {
	e := newEngine(t, Options{ScaleOut: true, BlockSize: 16})
	tokens := func(path string, parts ...string) (ids []uint32) {
		t.Helper()
		var v struct {
			Tokens []uint32 `json:"tokens"`
		}
		if err := json.Unmarshal(post(t, e, path, chat("", parts...)).body, &v); err != nil {
			t.Fatal(err)
		}
		return v.Tokens
	}
	text := tokens("/tokenize", someText)
	for name, part := range map[string]string{
		"image": image("a"), "audio": `{"type":"input_audio","input_audio":{"data":"AAAA","format":"wav"}}`,
		"video": `{"type":"video_url","video_url":{"url":"http://x/v"}}`, "embeds": embeds("k"),
		"anthropic": `{"type":"image","source":{"type":"base64","data":"AAAA"}}`, "responses": `{"type":"input_image","image_url":"http://x/a.png"}`,
	} {
		if n := len(tokens("/tokenize", someText, part)) - len(text); n != mediaTokens {
			t.Errorf("%s takes %d tokens", name, n)
		}
	}
	equal := func(a, b string, want bool) {
		t.Helper()
		if got := slices.Equal(tokens("/tokenize", a), tokens("/tokenize", b)); got != want {
			t.Errorf("%s and %s: equal %v", a, b, got)
		}
	}
	equal(image("a"), image("b"), false)
	equal(image("a"), `{"type":"image_url", "image_url":{"detail":"low","url":"http:\/\/x/a.png"}}`, true)
	equal(image("a"), keyed("a", "k"), false)
	equal(keyed("a", "k"), keyed("b", "k"), true)
	equal(keyed("a", "k"), embeds("k"), true)
	equal(image("a"), `{"type":"input_image","image_url":"http://x/a.png"}`, true)
}

func TestSharedEncoderStore(t *testing.T) {
	e, pd := newEncoders(t, encoderExample, fast)
	a, b := image("a"), image("b")
	if h := encodeLeg(t, e, a); h != "null" {
		t.Errorf("the store's encoder answers %s", h)
	}
	if r := ask(t, pd, chat("", a, b, someText, someText)); r.status != http.StatusOK {
		t.Fatalf("%d %s", r.status, r.body)
	}
	if got := hows(pd); got != "store<e local<pd" {
		t.Errorf("consumer: %s", got)
	}
	if got := hows(e); got != "encoded<e" {
		t.Errorf("encoder: %s", got)
	}
	s := pd.Stats()
	if s.EncodedLocally != 1 || s.FetchedEncodings != 1 || e.Stats().Encoded != 1 || e.Stats().HeldEncodings != 0 {
		t.Errorf("consumer %+v, encoder %+v", s, e.Stats())
	}
	// What the prefix cache has needs no encoder; what the encoder cache has costs nothing.
	ask(t, pd, chat("", a, b, someText, someText))
	ask(t, pd, chat("", b))
	if got := hows(pd); got != "store<e local<pd cache<pd" {
		t.Errorf("consumer, again: %s", got)
	}
	if v := metric(t, pd, "vllm:mm_cache_hits_total"); v != "1.0" {
		t.Errorf("encoder cache hits: %s", v)
	}
}

func TestEncodingCostsTimeWhereItIsDone(t *testing.T) {
	o := Options{Peers: NewRegistry(), Encoder: encoderExample, Encode: 30 * time.Second, Scale: fast} // 300 ms
	o.Name, o.Role = "e", roleEncode
	e := newEngine(t, o)
	o.Name, o.Role = "p", phasePrefill
	p := newEngine(t, o)
	o.Name, o.Encode = "slow", 200*patience // twice what a test waits
	slow := newEngine(t, o)
	took := func(e *Engine, body string) time.Duration {
		start := time.Now()
		if r := ask(t, e, body); r.status != http.StatusOK {
			t.Fatalf("%d %s", r.status, r.body)
		}
		return time.Since(start)
	}
	if d := took(e, chat("", image("a"), image("a"))); d < 300*time.Millisecond || hows(e) != "encoded<e" {
		t.Errorf("one item twice: %v, %s", d, hows(e))
	}
	if d := took(slow, chat("", image("a"))); d > patience || hows(slow) != "store<e" {
		t.Errorf("found in the store: %v, %s", d, hows(slow))
	}
	if d := took(p, chat("", image("b"), image("c"))); d < 600*time.Millisecond {
		t.Errorf("two items encoded locally: %v", d)
	}
}

func TestEncoderHandles(t *testing.T) {
	e, pd := newEncoders(t, encoderNIXL, fast)
	h := encodeLeg(t, e, keyed("a", "ka"), keyed("b", "kb"), keyed("a", "ka"))
	var handles map[string]struct {
		Metadata map[string]any `json:"metadata"`
		Items    []int          `json:"item_indices"`
		Host     string         `json:"peer_host"`
		Port     int            `json:"peer_port"`
		Size     int            `json:"size_bytes"`
	}
	if err := json.Unmarshal([]byte(h), &handles); err != nil || len(handles) != 2 {
		t.Fatalf("handles: %s", h)
	}
	if k := handles["ka"]; fmt.Sprint(k.Items) != "[0 2]" || k.Host != "127.0.0.1" || k.Port != 5601 || k.Size <= 0 || k.Metadata["image_grid_thw"] == nil {
		t.Errorf("handle: %+v", k)
	}
	if held := e.HeldEncodings(); len(held) != 2 || held[0].Key != "ka" || e.Stats().HeldEncodings != 2 {
		t.Errorf("held: %+v", held)
	}
	if r := ask(t, pd, chat(withEncodings(h), someText, embeds("ka"), keyed("b", "kb"))); r.status != http.StatusOK {
		t.Fatalf("%d %s", r.status, r.body)
	}
	if got := hows(pd); got != "peer<e peer<e" {
		t.Errorf("consumer: %s", got)
	}
	if len(e.HeldEncodings()) != 0 || len(e.LeakedEncodings()) != 0 || e.Stats().Encoded != 2 {
		t.Errorf("held %v, leaked %v, stats %+v", e.HeldEncodings(), e.LeakedEncodings(), e.Stats())
	}
}

// TestUnreadEncodingLeaks has nobody read what an encoder pinned, for the 30 s that it keeps it.
func TestUnreadEncodingLeaks(t *testing.T) {
	e := newEngine(t, Options{Encoder: encoderNIXL, Role: roleEncode})
	encodeLeg(t, e, keyed("c", "kc"))
	eventually(t, "leak", func() bool { return len(e.HeldEncodings()) == 0 })
	if l := e.LeakedEncodings(); len(l) != 1 || l[0].Key != "kc" || l[0].At.Sub(l[0].Since) < 300*time.Millisecond || e.Stats().LeakedEncodings != 1 {
		t.Errorf("leaks: %+v", l)
	}
	var s State
	if err := json.Unmarshal(get(t, e, "/admin/state").body, &s); err != nil || s.LeakedEncodings != 1 || s.Encoded != 1 {
		t.Errorf("state: %+v, %v", s.Stats, err)
	}
}

func TestEmbeddingsWithoutAHandleAreRefused(t *testing.T) {
	e, pd := newEncoders(t, encoderNIXL, fast)
	h := encodeLeg(t, e, keyed("a", "ka"))
	for name, extra := range map[string]string{
		"none": "", "another item's": strings.Replace(withEncodings(h), `"ka"`, `"kx"`, 1),
		"without a port": withEncodings(strings.Replace(h, `"peer_port"`, `"x"`, 1)),
		"not an object":  withEncodings(`{"ka":7}`),
	} {
		if r := ask(t, pd, chat(extra, embeds("ka"))); r.status != http.StatusBadRequest {
			t.Errorf("%s: %d %s", name, r.status, r.body)
		}
	}
	if r := ask(t, pd, chat(withEncodings(`[]`), embeds("ka"))); r.status != http.StatusBadRequest {
		t.Errorf("handles are a list: %d", r.status)
	}
	plain := newEngine(t, Options{})
	if r := ask(t, plain, chat(withEncodings(h), embeds("ka"))); r.status != http.StatusBadRequest || !strings.Contains(string(r.body), "enable-mm-embeds") {
		t.Errorf("no encoder connector: %d %s", r.status, r.body)
	}
	settleEncodings(t, e)
}

// settleEncodings ends the time of what is pinned, and waits until nothing is.
func settleEncodings(t *testing.T, e *Engine) {
	t.Helper()
	eventually(t, "no pin", func() bool { endPins(e); return len(e.HeldEncodings()) == 0 })
}

// TestEncoderRefusals has a peer that refuses, and wants local encoding only where the media is in the body.
func TestEncoderRefusals(t *testing.T) {
	for _, kind := range []string{nackMissing, nackIncompat, nackVersion, nackInternal, nackNotReady, nackSilent, nackStall} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			shuns, scale := slices.Contains([]string{nackSilent, nackStall}, kind), fast
			if shuns {
				scale = 0.1 // quarantine of 6 s
			}
			e, pd := newEncoders(t, encoderNIXL, scale)
			h := withEncodings(encodeLeg(t, e, keyed("a", "ka"), keyed("b", "kb")))
			setFaults(t, e, Faults{Encoder: kind})
			if r := ask(t, pd, chat(h, keyed("a", "ka"))); r.status != http.StatusOK {
				t.Errorf("with the media: %d %s", r.status, r.body)
			}
			if r := ask(t, pd, chat(h, embeds("kb"))); r.status != http.StatusInternalServerError {
				t.Errorf("without the media: %d %s", r.status, r.body)
			}
			got := pd.Encodings()
			if len(got) != 2 || got[0].How != encodedLocally || got[0].Err == "" || got[1].How != "" || got[1].Err == "" {
				t.Fatalf("encodings: %+v", got)
			}
			if nack := got[0].Err; shuns {
				if got[1].Err != "peer in quarantine" {
					t.Errorf("second try: %s", got[1].Err)
				}
			} else if nack != kind || got[1].Err != kind {
				t.Errorf("refusals: %s, %s", nack, got[1].Err)
			}
			if s := pd.Stats(); s.EncodedLocally != 1 || s.FailedEncodings != 1 {
				t.Errorf("stats: %+v", s)
			}
			settleEncodings(t, e)
		})
	}
}

func TestEncoderBecomesReady(t *testing.T) {
	e, pd := newEncoders(t, encoderNIXL, 1) // asks for 20 s
	h := withEncodings(encodeLeg(t, e, keyed("a", "ka")))
	setFaults(t, e, Faults{Encoder: nackNotReady})
	done := make(chan reply, 1)
	go func() {
		r, _ := send(t.Context(), t, http.MethodPost, pd.URL()+"/v1/chat/completions", chat(h, embeds("ka")))
		done <- r
	}()
	eventually(t, "asked", func() bool { return len(pd.Held()) == 1 && pd.Held()[0].State == stateEncode })
	setFaults(t, e, Faults{})
	if r := <-done; r.status != http.StatusOK || hows(pd) != "peer<e" {
		t.Errorf("%d %s, %s", r.status, r.body, hows(pd))
	}
}

// TestQuarantine has a consumer ask an encoder that is down, and again when it is back.
func TestQuarantine(t *testing.T) {
	// shunned returns what becomes of the next item, and when the first was asked for.
	shunned := func(t *testing.T, scale float64) (next func(name string) (why string), since time.Time) {
		t.Helper()
		e, pd := newEncoders(t, encoderNIXL, scale)
		h := withEncodings(encodeLeg(t, e, keyed("a", "ka")))
		e.Kill()
		since = time.Now()
		if r := ask(t, pd, chat(h, keyed("a", "ka"))); r.status != http.StatusOK {
			t.Fatalf("%d %s", r.status, r.body)
		}
		if err := e.Restart(); err != nil {
			t.Fatal(err)
		}
		return func(name string) string {
			h := withEncodings(encodeLeg(t, e, keyed(name, name)))
			ask(t, pd, chat(h, keyed(name, name)))
			all := pd.Encodings()
			return all[len(all)-1].Err
		}, since
	}
	t.Run("begins", func(t *testing.T) {
		next, _ := shunned(t, 0.1) // 6 s
		if got := next("b"); got != "peer in quarantine" {
			t.Errorf("after the restart: %q", got)
		}
	})
	t.Run("ends", func(t *testing.T) {
		next, since := shunned(t, fast)
		n := 0
		eventually(t, "out of quarantine", func() bool { n++; return next(fmt.Sprint("c", n)) == "" })
		if took := time.Since(since); took < 600*time.Millisecond {
			t.Errorf("ended after %v", took)
		}
	})
}

// TestEncodePrefillDecode sends a request through three engines: the decode leg has placeholders only.
func TestEncodePrefillDecode(t *testing.T) {
	o := Options{Peers: NewRegistry(), Encoder: encoderNIXL, Seed: 3, Scale: 1}
	engine := func(name, role string) *Engine {
		o.Name, o.Role = name, role
		return newEngine(t, o)
	}
	e, p, d, alone := engine("e", roleEncode), engine("p", "prefill"), engine("d", "decode"), engine("x", "")
	want := ask(t, alone, chat("", someText, keyed("a", "ka"))).json(t)["choices"]
	h := encodeLeg(t, e, keyed("a", "ka"))
	var v struct {
		KV json.RawMessage `json:"kv_transfer_params"`
	}
	leg := strings.Replace(chat(withEncodings(h)+askHandle, someText, embeds("ka")), `"max_tokens":4`, `"max_tokens":1`, 1)
	r := ask(t, p, leg)
	if err := json.Unmarshal(r.body, &v); err != nil || r.status != http.StatusOK {
		t.Fatalf("%d %s", r.status, r.body)
	}
	r = ask(t, d, chat(withHandle(string(v.KV)), someText, embeds("ka")))
	if got := r.json(t)["choices"]; fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("decode: %s\nalone: %v", r.body, want)
	}
	if hows(e) != "encoded<e" || hows(p) != "peer<e" || hows(d) != "" {
		t.Errorf("e %s, p %s, d %s", hows(e), hows(p), hows(d))
	}
	if b := e.Bodies(); len(b) != 1 || b[0].Phase != phaseEncode {
		t.Errorf("the encoder's request: %+v", b)
	}
	setFaults(t, e, Faults{Rules: []Fault{{Kind: faultStatus, Phase: phaseEncode}}})
	if r := ask(t, e, chat("", image("b"))); r.status != http.StatusServiceUnavailable {
		t.Errorf("fault of the encode phase: %d", r.status)
	}
}

func TestEncodeLegWithoutAHandle(t *testing.T) {
	e, _ := newEncoders(t, encoderNIXL, fast)
	setFaults(t, e, Faults{Rules: []Fault{{Kind: faultNoHandle, Next: 1}, {Kind: faultOddHandle, Next: 1}}})
	if h := encodeLeg(t, e, keyed("a", "ka")); h != "null" || len(e.HeldEncodings()) != 1 {
		t.Errorf("withheld: %s", h)
	}
	if h := encodeLeg(t, e, keyed("a", "ka")); !strings.Contains(h, `"zz_big":123456789012345678901234567890`) {
		t.Errorf("odd: %s", h)
	}
	settleEncodings(t, e)
	if len(e.LeakedEncodings()) != 2 {
		t.Errorf("leaks: %+v", e.LeakedEncodings())
	}
}

func TestRolesThatEncode(t *testing.T) {
	o := Options{Peers: NewRegistry(), Encoder: encoderExample}
	engine := func(name, role string) *Engine {
		o.Name, o.Role = name, role
		return newEngine(t, o)
	}
	ep, epd, pd := engine("ep", roleEncodePrefill), engine("epd", roleEncodeAll), engine("pd", "prefill-decode")
	for i, e := range []*Engine{ep, epd, pd} {
		if r := ask(t, e, chat("", someText, image(strconv.Itoa(i)))); r.status != http.StatusOK || len(r.json(t)["choices"].([]any)) != 1 {
			t.Errorf("%d %s", r.status, r.body)
		}
	}
	ask(t, pd, chat("", image("0"), image("1")))
	if got := hows(pd); got != "local<pd store<ep store<epd" {
		t.Errorf("found: %s", got)
	}
	ask(t, ep, chat("", image("2")))
	if got := hows(ep); got != "local<ep local<ep" {
		t.Errorf("what a decode engine encoded is not shared: %s", got)
	}
}
