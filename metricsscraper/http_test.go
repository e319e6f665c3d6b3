// SPDX-License-Identifier: Apache-2.0

package metricsscraper

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/baton-epp/baton/pool"
)

// fetchOnce makes a scraper and sends n scrapes to a server.
func fetchOnce(t *testing.T, opts Options, address string, n int) (*pool.Endpoint, *target) {
	t.Helper()
	s, err := New(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.client.CloseIdleConnections)
	e := endpoint(address)
	target := s.newTarget(t.Context(), e, s.opts.Engines.of(e))
	for range n {
		target.scrape(t.Context())
	}
	return e, target
}

func TestOneKeptConnection(t *testing.T) {
	var connections atomic.Int32
	page := pages(t)["vllm_load.prom"]
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if got := r.Header.Get("Accept-Encoding"); got != "identity" {
			t.Errorf("Accept-Encoding %q", got)
		}
		if strings.Contains(r.Header.Get("Accept"), "openmetrics") {
			t.Errorf("Accept %q", r.Header.Get("Accept"))
		}
		_, _ = w.Write(page)
	}))
	srv.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			connections.Add(1)
		}
	}
	srv.Start()
	defer srv.Close()
	e, _ := fetchOnce(t, options(), srv.Listener.Addr().String(), 10)
	if n := connections.Load(); n != 1 {
		t.Errorf("%d connections for 10 scrapes", n)
	}
	if m := e.Metrics(); m.Waiting != 8 || m.Running != 2 || m.NumBlocks != 160 {
		t.Errorf("metrics %+v", m)
	}
}

func TestHostileServers(t *testing.T) {
	elsewhere := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("a redirect was followed") }))
	defer elsewhere.Close()
	tests := []struct {
		name, want string
		handler    http.HandlerFunc
	}{
		{"large", reasonTooLarge, func(w http.ResponseWriter, _ *http.Request) {
			_, _ = w.Write([]byte(strings.Repeat("vllm:num_requests_running 1\n", 3000)))
		}},
		{"redirect", reasonStatus, func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere.URL, http.StatusFound)
		}},
		{"error", reasonStatus, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) }},
		{"other page", reasonNoMetric, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "<html>") }},
		{"hang", reasonTimeout, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }},
		{"half a page", reasonConnection, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "1000")
			fmt.Fprintln(w, "vllm:num_requests_running 1")
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			srv := httptest.NewServer(tt.handler)
			defer srv.Close()
			opts := options()
			reg := prometheus.NewRegistry()
			opts.Registerer = reg
			opts.Scraping.MaxPageBytes = 64 << 10
			if tt.want == reasonTimeout {
				opts.Scraping.Timeout = 50 * time.Millisecond
			}
			e, _ := fetchOnce(t, opts, srv.Listener.Addr().String(), 1)
			if got := sample(t, reg, "llm_d_epp_datalayer_poll_errors_total", tt.want); got != 1 {
				t.Errorf("reason %s counted %v times", tt.want, got)
			}
			if e.Metrics().Has != 0 {
				t.Errorf("metrics %+v", e.Metrics())
			}
		})
	}
}

func TestRefusedIsSeen(t *testing.T) {
	e, target := fetchOnce(t, options(), "127.0.0.1:1", 2) // a port below those that are given to anybody
	if e.Health.Standing(time.Now()) != pool.NotReady || target.refused != 2 {
		t.Errorf("refused %d times, standing %v", target.refused, e.Health.Standing(time.Now()))
	}
}

func TestTLSAndPort(t *testing.T) {
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/prom" {
			fmt.Fprintln(w, "vllm:num_requests_running 5")
		}
	}))
	srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError) // one client refuses its certificate
	srv.StartTLS()
	defer srv.Close()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
	if err := os.WriteFile(ca, block, 0o600); err != nil {
		t.Fatal(err)
	}
	port := netip.MustParseAddrPort(srv.Listener.Addr().String()).Port()
	f := func(src Source, wantRunning float64) {
		t.Helper()
		src.Scheme, src.Path, src.Port = "https", "/prom", port
		opts := options()
		opts.Source = src
		s, err := New(opts)
		if err != nil {
			t.Fatal(err)
		}
		defer s.client.CloseIdleConnections()
		e := endpoint("127.0.0.1:1")
		s.newTarget(t.Context(), e, s.opts.Engines.of(e)).scrape(t.Context())
		if got := e.Metrics().Running; got != wantRunning {
			t.Errorf("%+v: running %v, want %v", src, got, wantRunning)
		}
	}
	f(Source{InsecureSkipVerify: true}, 5)
	f(Source{CACertPath: ca}, 5)
	f(Source{}, 0) // verified against the system's roots
	opts := options()
	opts.Source = Source{Scheme: "https", Path: "/", CACertPath: "nowhere"}
	if _, err := New(opts); err == nil {
		t.Error("a missing CA file is no problem")
	}
}

func TestReason(t *testing.T) {
	f := func(err error, want string) {
		t.Helper()
		if got := reason(err); got != want {
			t.Errorf("%v: %s, want %s", err, got, want)
		}
	}
	f(&net.OpError{Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}, reasonRefused)
	f(fmt.Errorf("x: %w", context.DeadlineExceeded), reasonTimeout)
	f(errors.New("reset"), reasonConnection)
}
