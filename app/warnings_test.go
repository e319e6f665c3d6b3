// SPDX-License-Identifier: Apache-2.0

package app

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// spoken is a log that may be read while it is written.
type spoken struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (s *spoken) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.Write(p)
}

// take returns what was said since the last time.
func (s *spoken) take() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer s.text.Reset()
	return s.text.String()
}

// TestConfigurationWarnings: what is not likely to be meant is said at the start, at each reload, and by Check.
func TestConfigurationWarnings(t *testing.T) {
	s := &stack{t: t, dir: t.TempDir()}
	replaceFile(t, s.endpointsFile(), "endpoints:\n- {name: d, address: 127.0.0.1, port: 1}\n")
	file := filepath.Join(s.dir, "config.yaml")
	text := []byte("apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\ndisaggregation: {kvConnector: {vllm: sglang}, parallelLegs: true}\n")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	wants := func(where, got string) {
		t.Helper()
		for _, want := range []string{"disaggregation.kvConnector.vllm", "disaggregation.parallelLegs"} {
			if strings.Count(got, want) != 1 {
				t.Errorf("%s: %q is not said once in\n%s", where, want, got)
			}
		}
	}
	_, warnings, err := Check(file)
	if err != nil {
		t.Fatal(err)
	}
	wants("check", strings.Join(warnings, "\n"))
	var log spoken
	a := s.startPicker(func(o *Options) {
		o.ConfigFile, o.EndpointsFile = file, s.endpointsFile()
		o.Logger = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelWarn}))
	}).app
	wants("start", log.take())
	if err := a.reload(text); err != nil {
		t.Fatal(err)
	}
	wants("reload", log.take())
}
