// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/baton-epp/baton/internal/leaktest"
)

// TestMain fails the package when goroutines outlive its tests.
func TestMain(m *testing.M) { os.Exit(leaktest.Run(m)) }

// fast makes durations short without making them nothing.
const fast = 0.01

// newEngine starts an engine that is closed with the test, and checks that it owes no block then. Leases and pins that
// are left end early, so that a test can have them as long as it likes.
func newEngine(t *testing.T, o Options) *Engine {
	t.Helper()
	if o.Scale == 0 {
		o.Scale = fast
	}
	if o.KeepAlive == 0 {
		o.KeepAlive = time.Hour
	}
	e, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		eventually(t, e.opts.Name+"'s leases and pins end", func() bool {
			e.JumpClock(1000 * time.Hour)
			endPins(e)
			return len(e.Held())+len(e.HeldEncodings()) == 0
		})
		settle(t, e)
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

// newPair starts a prefill and a decode engine that know each other.
func newPair(t *testing.T, o Options) (prefill, decode *Engine) {
	t.Helper()
	return newPairOf(t, o, o)
}

// newPairOf is newPair with options for each.
func newPairOf(t *testing.T, p, d Options) (prefill, decode *Engine) {
	t.Helper()
	p.Peers = NewRegistry()
	d.Peers = p.Peers
	p.Name, p.Role = "p", "prefill"
	d.Name, d.Role = "d", "decode"
	prefill = newEngine(t, p)
	return prefill, newEngine(t, d)
}

// settle waits until nothing runs and no block is held, which is the check after every scenario: leases end as leaks.
func settle(t *testing.T, e *Engine) {
	t.Helper()
	idle := func() bool {
		s := e.Stats()
		return len(e.Held()) == 0 && s.HeldBlocks+s.HeldEncodings+s.Running+s.Waiting+s.Deferred == 0
	}
	defer func() {
		if !idle() {
			t.Logf("engine %s at the end: %+v, held %+v", e.opts.Name, e.Stats(), e.Held())
		}
	}()
	eventually(t, e.opts.Name+" is idle", idle)
}

// patience is how long a machine that stalls may take for what takes an idle one no time.
const patience = time.Minute

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", patience, what)
		}
		time.Sleep(time.Millisecond)
	}
}

// reply is a response with its body read.
type reply struct {
	status int
	header http.Header
	body   []byte
	err    error // of reading the body
}

func (r reply) json(t *testing.T) map[string]any {
	t.Helper()
	var v map[string]any
	if err := json.Unmarshal(r.body, &v); err != nil {
		t.Fatalf("status %d, body %q: %v", r.status, r.body, err)
	}
	return v
}

// newClient returns a client of its own connections, closed with the test.
func newClient(t *testing.T) *http.Client {
	t.Helper()
	tr := &http.Transport{DialContext: (&net.Dialer{}).DialContext, DisableCompression: true}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{
		Transport:     tr,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// send makes one request; err is that of the exchange.
func send(ctx context.Context, t *testing.T, method, url, body string, header ...string) (reply, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := newClient(t).Do(req)
	if err != nil {
		return reply{}, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return reply{status: resp.StatusCode, header: resp.Header, body: b, err: err}, nil
}

func post(t *testing.T, e *Engine, path, body string, header ...string) reply {
	t.Helper()
	r, err := send(t.Context(), t, http.MethodPost, e.URL()+path, body, header...)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func get(t *testing.T, e *Engine, path string, header ...string) reply {
	t.Helper()
	r, err := send(t.Context(), t, http.MethodGet, e.URL()+path, "", header...)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// prompt is n token ids; seed tells prompts apart.
func prompt(n, seed int) string {
	var b bytes.Buffer
	b.WriteByte('[')
	for i := range n {
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprint(&b, 100+(seed*101+i*37)%1900)
	}
	b.WriteByte(']')
	return b.String()
}

// complete is a completion request body; extra is appended to its fields.
func complete(prompt string, maxTokens int, extra string) string {
	return fmt.Sprintf(`{"model":"tiny","prompt":%s,"max_tokens":%d,"temperature":0%s}`, prompt, maxTokens, extra)
}

const askHandle = `,"kv_transfer_params":{"do_remote_decode":true}`

// text is the first answer's text.
func text(t *testing.T, r reply) string {
	t.Helper()
	if r.status != http.StatusOK {
		t.Fatalf("status %d: %s", r.status, r.body)
	}
	s, _ := r.json(t)["choices"].([]any)[0].(map[string]any)["text"].(string)
	return s
}

// prefillLeg sends a prefill leg and returns the handle, as it came.
func prefillLeg(t *testing.T, e *Engine, prompt, extra string) string {
	t.Helper()
	r := post(t, e, "/v1/completions", complete(prompt, 1, askHandle+extra))
	if r.status != http.StatusOK {
		t.Fatalf("prefill: status %d: %s", r.status, r.body)
	}
	var v struct {
		KV json.RawMessage `json:"kv_transfer_params"`
	}
	if err := json.Unmarshal(r.body, &v); err != nil {
		t.Fatal(err)
	}
	return string(v.KV)
}

// edited is a handle with some fields replaced.
func edited(t *testing.T, handle string, fields map[string]any) string {
	t.Helper()
	var m map[string]any
	if err := json.Unmarshal([]byte(handle), &m); err != nil {
		t.Fatal(err)
	}
	for k, v := range fields {
		if v == nil {
			delete(m, k)
			continue
		}
		m[k] = v
	}
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func withHandle(handle string) string { return `,"kv_transfer_params":` + handle }
