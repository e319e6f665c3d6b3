// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"bufio"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.opentelemetry.io/otel/sdk/trace"
	oteltrace "go.opentelemetry.io/otel/trace"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/simulate"
)

// TestHostileHeaders dials nothing that a client names (S0-25, SSRF row of section 7).
func TestHostileHeaders(t *testing.T) {
	evil := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("a client chose whom we dial") }))
	defer evil.Close()
	addr := evil.Listener.Addr().String()
	t.Setenv("HTTP_PROXY", evil.URL)
	t.Setenv("http_proxy", evil.URL)
	r := newRig(t, nil)
	var got *http.Request
	p := r.server("p", func(w http.ResponseWriter, req *http.Request) {
		got = req
		answer(goodAnswer)(w, req)
	})
	j := r.job(inference.Completions, `{"prompt":"x","kv_transfer_params":{"remote_host":"`+addr+`"}}`, nil, p)
	j.Request.Path = "http://" + addr + "/v1/completions?x=http://" + addr
	j.Request.Headers = inference.Headers{
		{Name: ":authority", Value: addr},
		{Name: "host", Value: addr},
		{Name: HeaderPrefiller, Value: addr},
		{Name: HeaderEncoders, Value: addr},
		{Name: "x-gateway-destination-endpoint", Value: addr},
		{Name: HeaderAttempt, Value: "9"},
		{Name: "connection", Value: "authorization"},
		{Name: "transfer-encoding", Value: "chunked"},
		{Name: "content-length", Value: "1"},
		{Name: "x-request-id", Value: "other"},
		{Name: "cookie", Value: "c"},
		{Name: "authorization", Value: "ok\r\nx-evil: 1"},
	}
	j.Request.ID = "id\r\nx-evil: 1"
	if out := r.run(j); out.Prefiller != p {
		t.Fatalf("%s after %s", out.Name, reasons(out))
	}
	if got.URL.Path != completionsPath || got.URL.RawQuery != "" || got.Host != p.Hostport || got.Header.Get(HeaderAttempt) != "1" {
		t.Errorf("%s %s %v", got.Host, got.URL, got.Header)
	}
	for name, values := range got.Header {
		if text := name + strings.Join(values, " "); strings.Contains(text, addr) || strings.Contains(strings.ToLower(text), "evil") || name == "Cookie" {
			t.Errorf("%s: %v", name, values)
		}
	}
}

// TestDialsOnlyThePool refuses an address that left the pool, even when a stale pick still names it, and names.
func TestDialsOnlyThePool(t *testing.T) {
	r := newRig(t, nil)
	p := r.server("p", answer(goodAnswer))
	dial := r.settings.Load().transport.DialContext
	f := func(address string, want bool) {
		t.Helper()
		conn, err := dial(t.Context(), "tcp", address)
		if conn != nil {
			_ = conn.Close()
		}
		if (err == nil) != want || err != nil && reasonOfError(err) != reasonGone {
			t.Errorf("%s: %v", address, err)
		}
	}
	f(p.Hostport, true)
	f(net.JoinHostPort("localhost", strconv.Itoa(int(p.Addr.Port()))), false)
	f(net.JoinHostPort("127.0.0.1", strconv.Itoa(int(p.Addr.Port()+1))), false)
	r.drop(p)
	f(p.Hostport, false)
}

// TestKeptConnections uses a connection again, but not one that the engine is about to close (5 s idle, scaled 1/5:
// the simulated engine closes after 1 s, we would after 4/5 s).
func TestKeptConnections(t *testing.T) {
	r, peers := newRig(t, nil), simulate.NewRegistry()
	r.settings.Load().transport.IdleConnTimeout = idleTimeout / 5
	_, p := r.engine("p", "prefill", peers, func(o *simulate.Options) { o.KeepAlive = 10 * time.Second }) // scale 0.1
	for _, pause := range []int{0, 100, 950, 1000, 1050} {
		time.Sleep(time.Duration(pause) * time.Millisecond)
		if out := r.run(r.job(inference.Completions, clientBody, nil, p)); reasons(out) != "ok" {
			t.Errorf("after %v: %s", pause, reasons(out))
		}
	}
}

// TestReplay: a kept connection that turns out reset is replaced within the attempt, once (praxis #1196); one that
// breaks at work is not.
func TestReplay(t *testing.T) {
	r := newRig(t, nil)
	var conns, requests atomic.Int32
	var broken atomic.Int32 // connections that die of their second request
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			conns.Add(1)
			go func() {
				defer c.Close()
				for br := bufio.NewReader(c); ; {
					req, err := http.ReadRequest(br)
					if err != nil {
						return
					}
					_, _ = io.Copy(io.Discard, req.Body)
					if requests.Add(1) > 1 && broken.Add(-1) >= 0 {
						_ = c.(*net.TCPConn).SetLinger(0)
						return
					}
					_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\ncontent-length: "+strconv.Itoa(len(goodAnswer))+"\r\n\r\n"+goodAnswer)
				}
			}()
		}
	}()
	p := r.add("p", "prefill", l.Addr().String())
	job := func() *Job { return r.job(inference.Completions, clientBody, nil, p) }
	r.run(job())
	broken.Store(1)
	if out := r.run(job()); reasons(out) != "ok" || out.Attempts[0].Number != 1 || conns.Load() != 2 || requests.Load() != 3 {
		t.Errorf("%s over %d connections, %d requests", reasons(out), conns.Load(), requests.Load())
	}
	r.want(1, "replays_total")
	// A prefill that runs beside decode has its own hold on the body.
	r.settings.Load().wires[""] = wire{meeting{newRooms()}, waiting()}
	broken.Store(1)
	j := r.job(inference.Completions, clientBody, r.add("d", "decode", "10.9.9.9:8000"), p)
	out, err := r.Run(t.Context(), j)
	if err != nil {
		t.Fatal(err)
	}
	j.Body, j.Request.Body = nil, inference.Body{}
	<-out.Pending()
	if err := r.Settle(t.Context(), j, out); err != nil || reasons(out) != "ok" || requests.Load() != 5 {
		t.Errorf("%s over %d requests, %v", reasons(out), requests.Load(), err)
	}
	r.want(2, "replays_total")
	r.settings.Load().wires = newRig(t, nil).settings.Load().wires
	broken.Store(2)
	if out := r.run(job()); out.Name != "fallback-reset" || len(out.Attempts) != 1 {
		t.Errorf("%s after %s", out.Name, reasons(out))
	}
}

// TestTLS verifies engines by a CA file, or not at all where that is asked for.
func TestTLS(t *testing.T) {
	s := httptest.NewUnstartedServer(answer(goodAnswer))
	s.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	s.StartTLS()
	defer s.Close()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	if err := os.WriteFile(ca, block, 0o600); err != nil {
		t.Fatal(err)
	}
	f := func(tr config.Transport, want string) {
		t.Helper()
		r := newRig(t, func(c *config.Disaggregation) { c.Transport = tr })
		out := r.run(r.job(inference.Completions, clientBody, nil, r.add("p", "prefill", s.Listener.Addr().String())))
		if !slices.Contains(strings.Fields(want), reasons(out)) {
			t.Errorf("%+v: %s, want %s", tr, reasons(out), want)
		}
	}
	f(config.Transport{Scheme: "https", CACertPath: ca}, "ok")
	f(config.Transport{Scheme: "https", InsecureSkipVerify: true}, "ok")
	f(config.Transport{Scheme: "https"}, "tls")
	// A TLS server's 400 for plain HTTP, unless the reset behind it, for what the server left unread, is faster.
	f(config.Transport{Scheme: "http"}, "rejected reset")
}

// TestTraceparent gives sub-requests a span of their own where the stream is traced.
func TestTraceparent(t *testing.T) {
	tp := trace.NewTracerProvider()
	ctx, span := tp.Tracer("t").Start(t.Context(), "request")
	defer span.End()
	r := newRig(t, nil)
	var got string
	p := r.server("p", func(w http.ResponseWriter, req *http.Request) {
		got = req.Header.Get("Traceparent")
		answer(goodAnswer)(w, req)
	})
	j := r.job(inference.Completions, clientBody, nil, p)
	j.Request.Headers = inference.Headers{{Name: "traceparent", Value: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"}}
	if _, err := r.Run(ctx, j); err != nil {
		t.Fatal(err)
	}
	sc := oteltrace.SpanContextFromContext(ctx)
	parts := strings.Split(got, "-")
	if len(parts) != 4 || parts[0] != "00" || parts[1] != sc.TraceID().String() || parts[2] == sc.SpanID().String() || len(parts[2]) != 16 || parts[3] != "01" {
		t.Errorf("traceparent %q in trace %s span %s", got, sc.TraceID(), sc.SpanID())
	}
}

// TestIPv6 dials and names endpoints with brackets.
func TestIPv6(t *testing.T) {
	l, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		t.Skip("no IPv6 here")
	}
	s := httptest.NewUnstartedServer(answer(goodAnswer))
	_ = s.Listener.Close()
	s.Listener = l
	s.Start()
	defer s.Close()
	r := newRig(t, func(c *config.Disaggregation) { c.Mode = "orchestrate" })
	p := r.add("p", "prefill", netip.MustParseAddrPort(l.Addr().String()).String())
	out := r.run(r.job(inference.Completions, clientBody, r.add("d", "decode", "[fd00::1]:8000"), p))
	if !out.HasHandle || !strings.HasPrefix(out.Headers[0].Value, "[::1]:") {
		t.Errorf("%+v", out)
	}
}

// TestReasonOfError names what broke an exchange.
func TestReasonOfError(t *testing.T) {
	f := func(err error, want string) {
		t.Helper()
		if got := reasonOfError(fmt.Errorf("wrapped: %w", err)); got != want {
			t.Errorf("%v: %s, want %s", err, got, want)
		}
	}
	f(&net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}, reasonRefused)
	f(&net.OpError{Op: "dial", Err: syscall.EHOSTUNREACH}, reasonRefused)
	f(&net.OpError{Op: "dial", Err: os.ErrDeadlineExceeded}, reasonConnectTimeout)
	f(&net.OpError{Op: "read", Err: syscall.ECONNRESET}, reasonReset)
	f(&net.OpError{Op: "write", Err: syscall.EPIPE}, reasonReset)
	f(io.EOF, reasonReset)
	f(io.ErrUnexpectedEOF, reasonReset)
	f(errReplayed, reasonReset)
	f(errNotInPool, reasonGone)
	f(&tls.CertificateVerificationError{}, reasonTLS)
	f(tls.RecordHeaderError{}, reasonTLS)
	f(tls.AlertError(42), reasonTLS)
	f(errors.New("malformed HTTP response"), reasonMalformed)
}
