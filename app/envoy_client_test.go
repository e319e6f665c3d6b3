// SPDX-License-Identifier: Apache-2.0

package app

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/baton-epp/baton/manifests/envoy"
)

// openAIPython makes, once, a Python environment with the official client, and returns its interpreter.
func openAIPython(t *testing.T) string {
	t.Helper()
	python, err := exec.LookPath("python3")
	if err != nil {
		t.Skip("NO PYTHON: the official OpenAI client is not tested; install python3 (with its venv module)")
	}
	folder, err := filepath.Abs("../.cache/openai-venv")
	if err != nil {
		t.Fatal(err)
	}
	installed := filepath.Join(folder, "installed")
	if _, err := os.Stat(installed); err == nil {
		return filepath.Join(folder, "bin", "python3")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	for _, command := range [][]string{
		{python, "-m", "venv", "--clear", folder},
		{filepath.Join(folder, "bin", "python3"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "openai>=2,<3"},
	} {
		if out, err := exec.CommandContext(ctx, command[0], command[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", strings.Join(command, " "), err, out)
		}
	}
	if err := os.WriteFile(installed, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(folder, "bin", "python3")
}

// TestEnvoyOpenAIClient runs the official Python client, unmodified, through each shipped configuration.
func TestEnvoyOpenAIClient(t *testing.T) {
	t.Parallel()
	python := openAIPython(t)
	for _, name := range []string{envoy.QuietOverrideHost, envoy.FullDuplexOverrideHost, envoy.BufferedOverrideHost} {
		t.Run(name, func(t *testing.T) {
			s := newStack(t, stackOptions{envoy: name})
			command := exec.CommandContext(t.Context(), python, "testdata/openai_client.py", s.envoy.URL+"/v1")
			command.Env = append(os.Environ(), "NO_PROXY=*", "no_proxy=*", "OPENAI_LOG=")
			out, err := command.CombinedOutput()
			if err != nil {
				t.Errorf("%v:\n%s", err, out)
			}
			s.settled()
		})
	}
}
