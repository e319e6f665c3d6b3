// SPDX-License-Identifier: Apache-2.0

// Package envoytest starts a real Envoy on loopback for tests, with one of the shipped configurations or any other.
package envoytest

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"
)

// Variable names the environment variable that holds the path of the Envoy binary; make test sets it.
const Variable = "BATON_ENVOY"

// Envoy is a running Envoy.
type Envoy struct {
	URL   string // for clients
	Admin string // admin interface
	PID   int
}

// Binary returns the Envoy to use; a test without one is skipped, loudly.
func Binary(tb testing.TB) string {
	tb.Helper()
	path := os.Getenv(Variable)
	if path == "" {
		tb.Skipf("NO REAL ENVOY: %s is not set; `make test` obtains Envoy and sets it", Variable)
	}
	return path
}

// FreePort finds a port that was free a moment ago.
func FreePort(tb testing.TB) int {
	tb.Helper()
	l, err := new(net.ListenConfig).Listen(tb.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	defer l.Close()
	addr, ok := l.Addr().(*net.TCPAddr)
	if !ok {
		tb.Fatalf("no TCP address: %v", l.Addr())
	}
	return addr.Port
}

// Start runs Envoy with the configuration that render makes for the two ports it is given, waits until Envoy serves and
// stops it with the test.
func Start(tb testing.TB, render func(listenPort, adminPort int) ([]byte, error)) *Envoy {
	tb.Helper()
	binary := Binary(tb)
	listen, admin := FreePort(tb), FreePort(tb)
	text, err := render(listen, admin)
	if err != nil {
		tb.Fatal(err)
	}
	dir := tb.TempDir()
	file := filepath.Join(dir, "envoy.yaml")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		tb.Fatal(err)
	}
	log := filepath.Join(dir, "envoy.log")
	// Stopped by the clean-up below, after the test's own context has ended.
	//nolint:gosec // the test's own Envoy
	cmd := exec.CommandContext(context.WithoutCancel(tb.Context()), binary, "-c", file, "--use-dynamic-base-id", "--concurrency", "1", "--log-level", "warn", "--log-path", log, "--drain-time-s", "1")
	out, err := os.Create(filepath.Join(dir, "envoy.out"))
	if err != nil {
		tb.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		_ = out.Close()
		if tb.Failed() {
			for _, name := range []string{log, out.Name()} {
				if text, err := os.ReadFile(name); err == nil && len(text) > 0 {
					tb.Logf("%s:\n%.8000s", filepath.Base(name), text)
				}
			}
		}
	})
	e := &Envoy{URL: "http://127.0.0.1:" + strconv.Itoa(listen), Admin: "http://127.0.0.1:" + strconv.Itoa(admin), PID: cmd.Process.Pid}
	if err := e.wait(tb.Context()); err != nil {
		tb.Fatal(err)
	}
	return e
}

// wait polls the admin interface until Envoy and its clusters' health checks are ready.
func (e *Envoy) wait(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	client := &http.Client{Timeout: 5 * time.Second}
	defer client.CloseIdleConnections()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	var last error
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, e.Admin+"/ready", http.NoBody)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err == nil {
			_ = resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return nil
			}
			err = fmt.Errorf("status %d", resp.StatusCode)
		}
		last = err
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("envoy not ready after 30 s: %w", last)
		}
	}
}
