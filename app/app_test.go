// SPDX-License-Identifier: Apache-2.0

package app

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/baton-epp/baton/director"
)

func dial(t *testing.T, target string, creds credentials.TransportCredentials) healthv1.HealthClient {
	t.Helper()
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return healthv1.NewHealthClient(conn)
}

func TestHealthNames(t *testing.T) { // P14, P15, P16
	s := newStack(t, stackOptions{noEnvoy: true})
	for name, target := range map[string]string{"health port": s.app.HealthAddr().String(), "ext_proc port": s.app.Addr().String()} {
		t.Run(name, func(t *testing.T) {
			client := dial(t, target, insecure.NewCredentials())
			for _, service := range []string{"", "liveness", "readiness", healthExtProc, "inference-extension"} {
				r, err := client.Check(t.Context(), &healthv1.HealthCheckRequest{Service: service})
				if err != nil || r.GetStatus() != healthv1.HealthCheckResponse_SERVING {
					t.Errorf("%q: %v, %v", service, r.GetStatus(), err)
				}
			}
			if _, err := client.Check(t.Context(), &healthv1.HealthCheckRequest{Service: "x"}); status.Code(err) != codes.NotFound {
				t.Errorf("an unknown name: %v", err)
			}
			list, err := client.List(t.Context(), &healthv1.HealthListRequest{})
			if err != nil || len(list.GetStatuses()) != 5 {
				t.Errorf("list: %v, %v", list, err)
			}
		})
	}
}

func TestHealthFollowsPoolAndDrain(t *testing.T) {
	s := newStack(t, stackOptions{noEnvoy: true, options: func(o *Options) { o.DrainDelay = 3 * time.Second }})
	client := dial(t, s.app.HealthAddr().String(), insecure.NewCredentials())
	watch, err := client.Watch(t.Context(), &healthv1.HealthCheckRequest{Service: healthReadiness})
	if err != nil {
		t.Fatal(err)
	}
	if r, err := watch.Recv(); err != nil || r.GetStatus() != healthv1.HealthCheckResponse_SERVING {
		t.Fatalf("%v, %v", r, err)
	}
	s.stop()
	if r, err := watch.Recv(); err != nil || r.GetStatus() != healthv1.HealthCheckResponse_NOT_SERVING {
		t.Errorf("after SIGTERM: %v, %v", r, err)
	}
	if r, err := client.Check(t.Context(), &healthv1.HealthCheckRequest{Service: healthLiveness}); err != nil || r.GetStatus() != healthv1.HealthCheckResponse_SERVING {
		t.Errorf("liveness while draining: %v, %v", r, err)
	}
}

func TestWatchDoesNotHoldUpTheDrain(t *testing.T) {
	s := newStack(t, stackOptions{noEnvoy: true, options: func(o *Options) { o.DrainTimeout = 15 * time.Second }})
	watch, err := dial(t, s.app.Addr().String(), insecure.NewCredentials()).Watch(t.Context(), &healthv1.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := watch.Recv(); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	s.stop()
	for err == nil {
		_, err = watch.Recv()
	}
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("an idle picker took %v to drain", took)
	}
}

func TestNotReadyBeforeThePoolIsKnown(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "epp.yaml")
	if err := os.WriteFile(file, []byte(strings.Replace(strings.Replace(testConfig, "%s", "always-disagg-pd-decider", 1), "%s", "", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	o := DefaultOptions()
	o.ConfigFile, o.BindAddress, o.GRPCPort, o.HealthPort, o.MetricsPort, o.DrainDelay = file, "127.0.0.1", 0, 0, -1, 0
	a, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	client := dial(t, a.HealthAddr().String(), insecure.NewCredentials())
	for service, want := range map[string]healthv1.HealthCheckResponse_ServingStatus{
		"liveness": healthv1.HealthCheckResponse_SERVING, "readiness": healthv1.HealthCheckResponse_NOT_SERVING, "": healthv1.HealthCheckResponse_NOT_SERVING,
	} {
		if r, err := client.Check(t.Context(), &healthv1.HealthCheckRequest{Service: service}, grpc.WaitForReady(true)); err != nil || r.GetStatus() != want {
			t.Errorf("%q: %v, %v, want %v", service, r.GetStatus(), err, want)
		}
	}
	// TLS is on by default, with a certificate made at start.
	tlsClient := dial(t, a.Addr().String(), credentials.NewTLS(&tls.Config{InsecureSkipVerify: true}))
	if _, err := tlsClient.Check(t.Context(), &healthv1.HealthCheckRequest{}); err != nil {
		t.Errorf("over TLS: %v", err)
	}
	stop()
	if err := <-done; err != nil {
		t.Errorf("run: %v", err)
	}
}

func TestBadOptionsAreOneClearError(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	yes := true
	dir := t.TempDir()
	good := filepath.Join(dir, "epp.yaml")
	if err := os.WriteFile(good, []byte(strings.Replace(strings.Replace(testConfig, "%s", "always-disagg-pd-decider", 1), "%s", "", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		change func(*Options)
		want   []string
	}{
		{"two configurations", func(o *Options) { o.ConfigText = "x" }, []string{"--config-file and --config-text"}},
		{"everything at once", func(o *Options) {
			o.GRPCPort, o.BindAddress, o.MetricsNames, o.MetricsAuth, o.RefreshMetricsInterval = 70000, "localhost", "x", &yes, 0
		}, []string{"--grpc-port: 70000", "--bind-address", "--metrics-names", "--metrics-endpoint-auth", "--refresh-metrics-interval"}},
		{"taken port", func(o *Options) { o.GRPCPort = port(taken.Addr()) }, []string{"--grpc-port", "address already in use"}},
		{"no file", func(o *Options) { o.ConfigFile = filepath.Join(dir, "none.yaml") }, []string{"--config-file", "no such file"}},
		{"no source", func(o *Options) { o.ConfigFile = "" }, []string{"file-discovery", "Kubernetes source is not built yet"}},
		{"two sources", func(o *Options) { o.EndpointsFile = good }, []string{"--endpoints-file and dataLayer.discovery"}},
		{"bad certificate", func(o *Options) { o.CertPath = dir }, []string{"--cert-path", "tls.crt"}},
		{"bad TLS version", func(o *Options) { o.TLSMinVersion = "1.0" }, []string{"--tls-min-version"}},
		{"bad suite", func(o *Options) { o.TLSCipherSuites = []string{"TLS_RSA_WITH_RC4_128_SHA"} }, []string{"--tls-cipher-suites"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := DefaultOptions()
			o.ConfigFile, o.BindAddress, o.GRPCPort, o.HealthPort, o.MetricsPort = good, "127.0.0.1", 0, 0, 0
			c.change(&o)
			a, err := New(o)
			if err == nil {
				a.closeListeners()
				t.Fatal("no error")
			}
			for _, want := range c.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error lacks %q:\n%v", want, err)
				}
			}
		})
	}
}

func TestUnixSocketReplacesADeadOne(t *testing.T) {
	path := filepath.Join(t.TempDir(), "baton.sock")
	first, err := unixSocket(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := unixSocket(path); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("a live socket was taken over: %v", err)
	}
	first.(*net.UnixListener).SetUnlinkOnClose(false)
	_ = first.Close()
	second, err := unixSocket(path)
	if err != nil {
		t.Fatalf("a dead socket: %v", err)
	}
	_ = second.Close()
}

func TestRingKeepsTheLast(t *testing.T) {
	r := newRing()
	for i := range ringSize + 10 {
		r.put(&director.Record{RequestID: "r", PromptTokens: i})
	}
	if got := r.last(3, ""); len(got) != 3 || got[0].PromptTokens != ringSize+9 || got[2].PromptTokens != ringSize+7 {
		t.Errorf("got %+v", got)
	}
	if got := r.last(ringSize, "r"); len(got) != ringSize || got[ringSize-1].PromptTokens != 10 {
		t.Errorf("%d records, oldest %d", len(got), got[len(got)-1].PromptTokens)
	}
	if got := r.last(10, "other"); len(got) != 0 {
		t.Errorf("got %+v", got)
	}
}

func TestDebugPages(t *testing.T) {
	s := newStack(t, stackOptions{noEnvoy: true})
	base := "http://" + s.app.MetricsAddr().String()
	get := func(path string) (int, []byte) {
		t.Helper()
		resp, err := http.Get(base + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, text
	}
	var endpoints []endpointView
	_, text := get("/debug/endpoints")
	if err := json.Unmarshal(text, &endpoints); err != nil || len(endpoints) != 4 || endpoints[0].Role != "prefill" || endpoints[0].Engine != "vllm" {
		t.Errorf("endpoints: %v, %+v", err, endpoints)
	}
	if code, _ := get("/debug/decisions?n=0"); code != http.StatusBadRequest {
		t.Errorf("n=0: %d", code)
	}
	if code, _ := get("/debug/pprof/"); code != http.StatusNotFound {
		t.Errorf("pprof is on without being asked for: %d", code)
	}
	off := newStack(t, stackOptions{noEnvoy: true, options: func(o *Options) { o.EnableDebug = false }})
	base = "http://" + off.app.MetricsAddr().String()
	if code, _ := get("/debug/decisions"); code != http.StatusNotFound {
		t.Errorf("debug pages without --enable-debug: %d", code)
	}
}

func TestHeldBytes(t *testing.T) {
	for _, c := range []struct{ configured, limit, want int64 }{
		{5, 1 << 40, 5}, {0, 0, autoHeldBytes}, {0, 1 << 30, 1 << 29}, {0, 1 << 40, autoHeldBytes},
	} {
		if got := heldBytes(c.configured, c.limit); got != c.want {
			t.Errorf("heldBytes(%d, %d) = %d, want %d", c.configured, c.limit, got, c.want)
		}
	}
}

func TestJoinedLeavesOrdinaryEndsOut(t *testing.T) {
	if err := joined(context.Canceled, http.ErrServerClosed, grpc.ErrServerStopped, nil); err != nil {
		t.Errorf("got %v", err)
	}
	if err := joined(errors.New("x")); err == nil {
		t.Error("an error was lost")
	}
}
