// SPDX-License-Identifier: Apache-2.0

package datastore

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/baton-epp/baton/config"
)

func TestParseFile(t *testing.T) {
	tests := []struct {
		name, text string
		want       string // name@addr:port/rank …
		bad        string
		err        string
	}{
		{name: "yaml", text: "endpoints:\n- {name: a, address: 10.0.0.1, port: \"8000\", labels: {llm-d.ai/role: decode}}\n- {name: b, address: 10.0.0.2, port: 8001, namespace: n}\n", want: "default/a@10.0.0.1:8000/0 n/b@10.0.0.2:8001/0"},
		{name: "json", text: `{"endpoints":[{"name":"a","address":"10.0.0.1","port":"8000"}]}`, want: "default/a@10.0.0.1:8000/0"},
		{name: "ranks", text: "endpoints:\n- {name: a, address: 10.0.0.1, ports: [8000, \"8001\"]}\n", want: "default/a@10.0.0.1:8000/0 default/a@10.0.0.1:8001/1"},
		{name: "ipv6", text: "endpoints:\n- {name: a, address: \"fd00::1\", port: 80}\n- {name: b, address: \"[::1]\", port: 81}\n- {name: c, address: \"::ffff:10.0.0.3\", port: 82}\n", want: "default/a@[fd00::1]:80/0 default/b@[::1]:81/0 default/c@10.0.0.3:82/0"},
		{name: "empty pool", text: "endpoints: []\n"},
		{name: "empty file", text: "", err: "f:1: endpoints: is required; an empty pool is written as endpoints: []"},
		{name: "no list", text: "endpoints: {a: b}\n", err: "f:1: endpoints: must be a list, is a mapping"},
		{name: "unknown section", text: "endpoint: []\n", err: "f:1: endpoint: unknown key, known here: endpoints"},
		{
			name: "bad entries",
			text: "endpoints:\n- {name: a, address: 10.0.0.1, port: 1}\n- {name: a, address: 10.0.0.2, port: 1}\n- {name: c, address: host, port: 1}\n- {name: d, address: 10.0.0.4}\n- {name: e, address: 10.0.0.5, port: 65536}\n" +
				"- {name: f, address: 10.0.0.1, port: 1}\n- {name: g, address: 10.0.0.7, port: 1, ports: [2]}\n- {address: 10.0.0.8, port: 1}\n- {name: i, addr_: 10.0.0.9}\n- {name: j, address: 10.0.0.10, ports: [1, x]}\n- {name: k, address: 10.0.0.11, port: 1}\n- {name: l, address: 0.0.0.0, port: 1}\n- {name: m/n, address: 10.0.0.12, port: 1}\n- x\n",
			want: "default/a@10.0.0.1:1/0 default/k@10.0.0.11:1/0",
			bad: strings.Join([]string{
				"f:3: endpoints[1].name: default/a is there already",
				"f:4: endpoints[2].address: \"host\", must be an IPv4 or IPv6 address",
				"f:5: endpoints[3].port: <nil>, must be a port from 1 to 65535",
				"f:6: endpoints[4].port: 65536, must be a port from 1 to 65535",
				"f:7: endpoints[5].port: 10.0.0.1:1 is there already",
				"f:8: endpoints[6].port: give either port or ports",
				"f:9: endpoints[7].name: \"\", must be a name without blanks and slashes",
				"f:10: endpoints[8].addr_: unknown key, known here: name, namespace, address, port, ports, labels",
				"f:11: endpoints[9].ports[1]: x, must be a port from 1 to 65535",
				"f:13: endpoints[11].address: \"0.0.0.0\", must be an IPv4 or IPv6 address",
				"f:14: endpoints[12].name: \"m/n\", must be a name without blanks and slashes",
				"f:15: endpoints[13]: must be a mapping, is \"x\"",
			}, "\n"),
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			wanted, bad, err := parseFile("f", []byte(tt.text))
			if text(err) != tt.err {
				t.Errorf("error %q, want %q", text(err), tt.err)
			}
			if diff := cmp.Diff(tt.want, show(wanted)); diff != "" {
				t.Errorf("endpoints (-want +got):\n%s", diff)
			}
			var lines []string
			for _, b := range bad {
				lines = append(lines, b.Error())
			}
			if diff := cmp.Diff(tt.bad, strings.Join(lines, "\n")); diff != "" {
				t.Errorf("bad (-want +got):\n%s", diff)
			}
		})
	}
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func show(wanted []Wanted) string {
	var out []string
	for _, w := range wanted {
		out = append(out, w.Namespace+"/"+w.Name+"@"+w.Addr.String()+"/"+string('0'+rune(w.Rank)))
	}
	return strings.Join(out, " ")
}

func TestDecodeFile(t *testing.T) {
	f := func(text, wantErr string) {
		t.Helper()
		p, err := config.Parse("f", []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		opts, err := DecodeFile(p)
		if wantErr != "" {
			if err == nil || err.Error() != wantErr {
				t.Errorf("error %v, want %s", err, wantErr)
			}
			return
		}
		if err != nil || opts.Path != "e.yaml" || !opts.WatchFile {
			t.Errorf("%+v %v", opts, err)
		}
	}
	f("{path: e.yaml, watchFile: true}", "")
	f("watchFile: true", "f:1: path: is required")
	f("{path: e.yaml, watch: true}", "f:1: watch: unknown key, known here: path, watchFile")
}

// watched runs a File on path and hands out what it publishes.
type watched struct {
	t    *testing.T
	path string
	got  chan string
	done chan error
	reg  *prometheus.Registry
}

func watch(t *testing.T, path string, opts FileOptions) *watched {
	t.Helper()
	w := &watched{t: t, path: path, got: make(chan string, 100), done: make(chan error, 1), reg: prometheus.NewRegistry()}
	opts.Path, opts.Logger, opts.Registerer = path, slog.New(slog.DiscardHandler), w.reg
	f, err := NewFile(opts)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		w.done <- f.Run(ctx, func(list []Wanted) { w.got <- show(list) })
	}()
	t.Cleanup(func() {
		cancel()
		<-stopped
	})
	return w
}

// want waits for the next published list.
func (w *watched) want(list string) {
	w.t.Helper()
	select {
	case got := <-w.got:
		if got != list {
			w.t.Fatalf("published %q, want %q", got, list)
		}
	case err := <-w.done:
		w.t.Fatalf("ended: %v", err)
	case <-time.After(10 * time.Second):
		w.t.Fatalf("nothing published, want %q", list)
	}
}

// loads waits until the file was looked at n times with the outcome.
func (w *watched) loads(outcome string, n float64) {
	w.t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for range 2000 {
		if gather(w.t, w.reg)["baton_datastore_file_loads_total{"+outcome+"}"] == n {
			return
		}
		<-tick.C
	}
	w.t.Fatalf("%s loads: %v, want %v", outcome, gather(w.t, w.reg), n)
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// replace writes as careful writers do: another file, renamed over the old one.
func replace(t *testing.T, path, text string) {
	t.Helper()
	write(t, path+".new", text)
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

const (
	listA  = "endpoints:\n- {name: a, address: 10.0.0.1, port: 1}\n"
	listAB = listA + "- {name: b, address: 10.0.0.2, port: 1}\n"
	wantA  = "default/a@10.0.0.1:1/0"
	wantAB = wantA + " default/b@10.0.0.2:1/0"
)

func TestFileStart(t *testing.T) {
	dir := t.TempDir()
	f := func(name, content, want string) {
		t.Helper()
		path := filepath.Join(dir, name)
		if content != "" {
			write(t, path, content)
		}
		w := watch(t, path, FileOptions{})
		select {
		case err := <-w.done:
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("ended with %v, want %s", err, want)
			}
		case got := <-w.got:
			if got != want {
				t.Errorf("published %q, want %q", got, want)
			}
		}
	}
	f("ok", listA, wantA)
	f("missing", "", "endpoints file "+filepath.Join(dir, "missing")+": openat missing: no such file or directory")
	f("no/folder", "", "no such file or directory")
	f("bad", listA+"- {name: b, address: 10.0.0.2}\n", "bad:3: endpoints[1].port: <nil>, must be a port")
	f("syntax", "endpoints: [", "syntax:1: ")
	f("large", "endpoints: []\n"+strings.Repeat("# comment\n", 110_000), "at most 1048576 are allowed")
}

func TestFileRefusesLinksOut(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "secret"), listA)
	inside := filepath.Join(dir, "inside")
	if err := os.Mkdir(inside, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("../secret", filepath.Join(inside, "e.yaml")); err != nil {
		t.Fatal(err)
	}
	w := watch(t, filepath.Join(inside, "e.yaml"), FileOptions{})
	if err := <-w.done; err == nil || !strings.Contains(err.Error(), "escapes") {
		t.Errorf("ended with %v", err)
	}
}

func TestFileWatch(t *testing.T) {
	for name, opts := range map[string]FileOptions{
		"notified": {WatchFile: true, poll: time.Hour},
		"polled":   {WatchFile: true, poll: 5 * time.Millisecond, silent: true},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "e.yaml")
			w := watch(t, path, opts)
			replace(t, path, listA)
			w.want(wantA)
			replace(t, path, listAB)
			w.want(wantAB)
			replace(t, path, listA)
			w.want(wantA)
			// Something unusable keeps what is there.
			failed := gather(t, w.reg)["baton_datastore_file_loads_total{failed}"] // at the start there was no file, which may have been noticed
			replace(t, path, "endpoints: [\n")
			w.loads("failed", failed+1)
			if gather(t, w.reg)["baton_datastore_file_current"] != 0 {
				t.Error("current while the file is broken")
			}
			// A bad entry is left out.
			replace(t, path, listAB+"- {name: c}\n")
			w.want(wantAB)
			w.loads("partial", 1)
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			w.loads("failed", failed+2)
			replace(t, path, listA)
			w.want(wantA)
			if gather(t, w.reg)["baton_datastore_file_current"] != 1 {
				t.Error("not current after a good file")
			}
		})
	}
}

// A ConfigMap volume: the file is a link through ..data, which is swapped by a rename.
func TestFileConfigMap(t *testing.T) {
	dir := t.TempDir()
	version := func(name, text string) {
		t.Helper()
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, name, "e.yaml"), text)
		if err := os.Symlink(name, filepath.Join(dir, "..data_tmp")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	version("..2026_1", listA)
	path := filepath.Join(dir, "e.yaml")
	if err := os.Symlink("..data/e.yaml", path); err != nil {
		t.Fatal(err)
	}
	w := watch(t, path, FileOptions{WatchFile: true, poll: time.Hour})
	w.want(wantA)
	version("..2026_2", listAB)
	w.want(wantAB)
}

func FuzzParseFile(f *testing.F) {
	f.Add([]byte(listAB))
	f.Add([]byte(`{"endpoints":[{"name":"a","address":"::1","ports":[1,"2"]}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		wanted, _, _ := parseFile("f", data)
		addrs := map[string]bool{}
		for _, w := range wanted {
			if !w.Addr.IsValid() || w.Addr.Port() == 0 || w.Name == "" || addrs[w.Addr.String()] {
				t.Fatalf("unusable or twice: %+v", w)
			}
			addrs[w.Addr.String()] = true
		}
	})
}
