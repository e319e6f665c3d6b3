// SPDX-License-Identifier: Apache-2.0

// Package envoytest starts a real Envoy on loopback for tests, with one of the shipped configurations or any other.
package envoytest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
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

// Start runs Envoy with the configuration that render makes, waits until Envoy serves and stops it with the test. Both
// ports in the configuration must be 0: Envoy takes free ones, so that no other test can take them first.
func Start(tb testing.TB, render func() ([]byte, error)) *Envoy {
	tb.Helper()
	binary := Binary(tb)
	text, err := render()
	if err != nil {
		tb.Fatal(err)
	}
	dir := tb.TempDir()
	file := filepath.Join(dir, "envoy.yaml")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		tb.Fatal(err)
	}
	log, admin := filepath.Join(dir, "envoy.log"), filepath.Join(dir, "admin")
	// Stopped by the clean-up below, after the test's own context has ended.
	//nolint:gosec // the test's own Envoy
	cmd := exec.CommandContext(context.WithoutCancel(tb.Context()), binary, "-c", file, "--admin-address-path", admin, "--use-dynamic-base-id", "--concurrency", "1", "--log-level", "warn", "--log-path", log, "--drain-time-s", "1")
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
	e := &Envoy{PID: cmd.Process.Pid}
	if err := e.wait(tb.Context(), admin); err != nil {
		tb.Fatal(err)
	}
	return e
}

// wait polls until Envoy has said where its admin interface listens, and that it and its clusters' health checks are
// ready; then it asks for the listener's address.
func (e *Envoy) wait(ctx context.Context, adminFile string) error {
	ctx, cancel := context.WithTimeout(ctx, 60*time.Second)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	last := errors.New("no admin interface")
	for {
		address, err := os.ReadFile(adminFile)
		if err == nil && len(address) > 0 {
			e.Admin = "http://" + string(address)
			if _, last = e.Get(ctx, "/ready"); last == nil {
				return e.findListener(ctx)
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("envoy not ready after 60 s: %w", last)
		}
	}
}

// findListener learns the port that the one listener was given.
func (e *Envoy) findListener(ctx context.Context) error {
	text, err := e.Get(ctx, "/listeners")
	if err != nil {
		return err
	}
	// name::address, a line each.
	_, address, ok := strings.Cut(strings.TrimSpace(string(text)), "::")
	if !ok {
		return fmt.Errorf("envoy listeners: %q", text)
	}
	e.URL = "http://" + address
	return nil
}

// Get asks the admin interface; anything but 200 is an error.
func (e *Envoy) Get(ctx context.Context, path string) ([]byte, error) {
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, e.Admin+path, http.NoBody)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("envoy admin %s: status %d", path, resp.StatusCode)
	}
	return io.ReadAll(resp.Body)
}
