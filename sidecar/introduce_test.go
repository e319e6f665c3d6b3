// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/sidecar/connectors"
)

// introduced is a meeting whose prefill endpoints are asked at another port first.
type introduced struct {
	meeting
	port func(*pool.Endpoint) uint16
}

func (i introduced) Introduce(x *connectors.Exchange) (port uint16, path string) {
	return i.port(x.Prefiller), "/query?full=1"
}

func (introduced) Introduced(answer []byte) error {
	if !bytes.HasPrefix(answer, []byte("{")) {
		return errors.New("no object")
	}
	return nil
}

func (i introduced) Prefill(x *connectors.Exchange, body *inference.Edits) {
	i.meeting.Prefill(x, body)
	body.Set("facts", x.Facts)
	x.Rank = 3
}

// bootstrap is a party whose prefill endpoints introduce themselves.
type bootstrap struct {
	*party
	asked atomic.Int64
	port  uint16
}

func newBootstrap(t *testing.T, h http.HandlerFunc) *bootstrap {
	t.Helper()
	b := &bootstrap{party: newParty(t, waiting(), nil)}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		b.asked.Add(1)
		if req.Method != http.MethodGet || req.URL.String() != "/query?full=1" || req.Header.Get(HeaderDepth) != "1" || req.Header.Get("Authorization") != "" {
			t.Errorf("%s %s %v", req.Method, req.URL, req.Header)
		}
		h(w, req)
	}))
	t.Cleanup(s.Close)
	b.port = netip.MustParseAddrPort(s.Listener.Addr().String()).Port()
	b.settings.Load().wires[""] = wire{introduced{meeting{newRooms()}, func(*pool.Endpoint) uint16 { return b.port }}, waiting()}
	return b
}

// TestIntroduction asks a prefill endpoint once, and again when its prefill or a transfer failed or its pod is another.
func TestIntroduction(t *testing.T) {
	b := newBootstrap(t, answer(`{"0":{"engine_id":"e"}}`))
	pe, say, got := b.holding("p")
	prefill := func(what string) (*Job, *Outcome) {
		t.Helper()
		j, out := b.forward(pe)
		say <- what // not before: a failure that is known at once is not forwarded
		b.over(out)
		_ = b.Settle(t.Context(), j, out)
		return j, out
	}
	asked := func(n int64, why string) {
		t.Helper()
		if b.asked.Load() != n {
			t.Errorf("asked %d times, want %d: %s", b.asked.Load(), n, why)
		}
	}
	prefill("200 {}")
	_, out := prefill("200 {}")
	asked(1, "it is known")
	if !strings.Contains(got.all(), `"facts":{"0":{"engine_id":"e"}}`) || got.heads[0].Get("X-Data-Parallel-Rank") != "3" {
		t.Errorf("%s %v", got.all(), got.heads[0])
	}
	b.Transferred(t.Context(), out, b.d, false)
	prefill("500 {}")
	asked(2, "a transfer failed")
	prefill("200 {}")
	asked(3, "a prefill failed")
	other := *pe
	other.UID = "another pod"
	b.drop(pe)
	b.all = append(b.all, &other)
	b.publish()
	pe = &other
	prefill("200 {}")
	asked(4, "another pod")
	if n := len(b.peers.byKey); n != 1 {
		t.Errorf("%d endpoints remembered, of %d", n, len(b.all))
	}
}

// TestIntroductionOfABurst asks once for all.
func TestIntroductionOfABurst(t *testing.T) {
	waits := make(chan struct{})
	b := newBootstrap(t, func(w http.ResponseWriter, _ *http.Request) {
		<-waits
		_, _ = io.WriteString(w, "{}")
	})
	pe := b.server("p", answer(`{}`))
	ctx, leaves := contextGone(t)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			j := b.job(inference.Completions, clientBody, b.d, pe)
			out, err := b.Run(t.Context(), j)
			if err != nil {
				t.Error(err)
				return
			}
			b.Leave(j, out, false)
		})
	}
	wg.Go(func() { // one that leaves takes nobody along
		if _, err := b.Run(ctx, b.job(inference.Completions, clientBody, b.d, pe)); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	eventually(t, "all under way", func() bool { return b.metric("in_flight", "prefill") == 9 && b.asked.Load() == 1 })
	leaves()
	eventually(t, "one gone", func() bool { return b.metric("in_flight", "prefill") == 8 })
	close(waits)
	wg.Wait()
	b.background.Wait()
	b.idle()
	if b.asked.Load() != 1 {
		t.Errorf("asked %d times", b.asked.Load())
	}
}

// TestIntroductionFails is a failed attempt: the next prefiller is asked, and nothing is sent to this one.
func TestIntroductionFails(t *testing.T) {
	for reason, h := range map[string]http.HandlerFunc{
		"status_5xx": status(500),
		"not_found":  status(404),
		"malformed":  answer("no object"),
		"reset":      func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
	} {
		t.Run(reason, func(t *testing.T) {
			bad := true
			b := newBootstrap(t, func(w http.ResponseWriter, req *http.Request) {
				if bad {
					bad = false
					h(w, req)
					return
				}
				answer("{}")(w, req)
			})
			first, _, got := b.holding("first")
			second, say, _ := b.holding("second")
			say <- "200 {}"
			j, out := b.forward(first, second)
			b.over(out)
			if err := b.Settle(t.Context(), j, out); err != nil || reasons(out) != reason+" ok" || out.Prefiller != second || got.all() != "" {
				t.Errorf("%s, %v; it got %q", reasons(out), err, got.all())
			}
		})
	}
	t.Run("too large", func(t *testing.T) {
		b := newBootstrap(t, answer("{"+strings.Repeat(" ", maxIntroduction)+"}"))
		pe, _, _ := b.holding("p")
		if out, err := b.Run(t.Context(), b.job(inference.Completions, clientBody, b.d, pe)); err == nil || reasons(out) != "malformed" {
			t.Errorf("%s, %v", reasons(out), err)
		}
	})
	t.Run("refused", func(t *testing.T) {
		b := newBootstrap(t, nil)
		pe, _, _ := b.holding("p")
		b.port = b.refusing("nobody").Addr.Port()
		var said bytes.Buffer
		b.log = slog.New(slog.NewTextHandler(&said, nil))
		where := fmt.Sprintf("introduction at 127.0.0.1:%d: ", b.port)
		for range 3 {
			out, err := b.Run(t.Context(), b.job(inference.Completions, clientBody, b.d, pe))
			if err == nil || reasons(out) != "refused" || !strings.HasPrefix(out.Attempts[0].Error, where) {
				t.Errorf("%+v, %v", out.Attempts, err)
			}
		}
		if strings.Count(said.String(), where) != 1 {
			t.Errorf("said %s", said.String())
		}
	})
}

// TestSideDoor: beside the pool's addresses only one port of the endpoint that introduces itself may be dialled, and only
// for that.
func TestSideDoor(t *testing.T) {
	r := newRig(t, nil)
	e := r.add("p", "prefill", "10.0.0.1:8000")
	at := netip.MustParseAddrPort
	door := func(owner peerKey, addr string) context.Context {
		return context.WithValue(t.Context(), sideDoor{}, sideDoor{owner: owner, addr: at(addr)})
	}
	for name, c := range map[string]struct {
		ctx  context.Context //nolint:containedctx // of one case
		addr string
		want bool
	}{
		"an endpoint":                   {t.Context(), "10.0.0.1:8000", true},
		"another port":                  {t.Context(), "10.0.0.1:8998", false},
		"its side door":                 {door(keyOf(e), "10.0.0.1:8998"), "10.0.0.1:8998", true},
		"a port beside it":              {door(keyOf(e), "10.0.0.1:8998"), "10.0.0.1:8999", false},
		"another host":                  {door(keyOf(e), "10.0.0.1:8998"), "10.0.0.2:8998", false},
		"a door in another's wall":      {door(keyOf(e), "10.0.0.2:8998"), "10.0.0.2:8998", false},
		"a pod that is gone":            {door(peerKey{"old", e.Addr}, "10.0.0.1:8998"), "10.0.0.1:8998", false},
		"an endpoint, through the door": {door(keyOf(e), "10.0.0.1:8998"), "10.0.0.1:8000", true},
	} {
		if got := r.permitted(c.ctx, at(c.addr)); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
		if c.want {
			continue
		}
		req, err := http.NewRequestWithContext(c.ctx, http.MethodGet, fmt.Sprintf("http://%s/", c.addr), http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := r.settings.Load().transport.RoundTrip(req)
		if !errors.Is(err, errNotInPool) {
			t.Errorf("%s: dialled, %v", name, err)
		}
		if err == nil {
			_ = resp.Body.Close()
		}
	}
}

// TestPanicInAnIntroduction fails the attempt.
func TestPanicInAnIntroduction(t *testing.T) {
	b := newBootstrap(t, answer("{}"))
	pe, _, _ := b.holding("p")
	b.settings.Load().wires[""] = wire{broken{introduced{meeting{newRooms()}, func(*pool.Endpoint) uint16 { return b.port }}}, waiting()}
	if out, err := b.Run(t.Context(), b.job(inference.Completions, clientBody, b.d, pe)); err == nil || reasons(out) != "malformed" {
		t.Errorf("%s, %v", reasons(out), err)
	}
}

type broken struct{ introduced }

func (broken) Introduced([]byte) error { panic("a connector's bug") }
