// SPDX-License-Identifier: Apache-2.0

package envoy

import (
	"bytes"
	"flag"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "rewrite the shipped configurations")

// TestShippedFiles checks that each YAML file is what the template gives.
func TestShippedFiles(t *testing.T) {
	for _, name := range Names() {
		file := name + ".yaml"
		want, err := Render(name, Defaults())
		if err != nil {
			t.Fatal(err)
		}
		if *update {
			if err := os.WriteFile(file, want, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		got, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s differs from the template: run go test ./manifests/envoy -update", file)
		}
	}
	files, err := filepath.Glob("*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != len(Names()) {
		t.Errorf("%d YAML files for %d configurations: %v", len(files), len(Names()), files)
	}
}

// TestValidate has the real Envoy judge every configuration, with and without TLS and with an IPv6 endpoint.
func TestValidate(t *testing.T) {
	binary := os.Getenv("BATON_ENVOY")
	if binary == "" {
		t.Skip("BATON_ENVOY names no Envoy binary: make test sets it")
	}
	f := func(name string, v Values) {
		t.Helper()
		config, err := Render(name, v)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(t.TempDir(), name+".yaml")
		if err := os.WriteFile(file, config, 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.CommandContext(t.Context(), binary, "--mode", "validate", "-c", file).CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
		for line := range strings.Lines(string(out)) {
			if strings.Contains(line, "[warning]") && strings.Contains(line, "eprecated") {
				t.Errorf("%s: %s", name, line)
			}
		}
	}
	for _, name := range Names() {
		f(name, Defaults())
		f(name, Values{
			ListenPort: 18081, AdminPort: 18019, EPPPort: 18002, EPPTLS: true, MessageTimeout: 200 * time.Millisecond,
			Endpoints: []netip.AddrPort{netip.MustParseAddrPort("[::1]:8000")},
		})
	}
}

func TestRenderRefuses(t *testing.T) {
	f := func(name string, v Values, want string) {
		t.Helper()
		if _, err := Render(name, v); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Render(%s): error %v, want one that says %q", name, err, want)
		}
	}
	f("loud", Defaults(), "there are quiet-override-host")
	f(QuietOverrideHost, Values{}, "no endpoints")
	if _, err := Render(QuietOriginalDst, Values{}); err != nil {
		t.Errorf("%s needs no endpoints: %v", QuietOriginalDst, err)
	}
}

// TestControlHeaders checks that each is removed, before the picker is asked.
func TestControlHeaders(t *testing.T) {
	for _, name := range Names() {
		config, err := Render(name, Defaults())
		if err != nil {
			t.Fatal(err)
		}
		before, _, found := strings.Cut(string(config), "envoy.filters.http.ext_proc")
		if !found {
			t.Fatalf("%s: no ext_proc filter", name)
		}
		for _, h := range ControlHeaders() {
			if !strings.Contains(before, "- remove: "+h+"\n") {
				t.Errorf("%s: %s is not removed before ext_proc", name, h)
			}
		}
	}
}
