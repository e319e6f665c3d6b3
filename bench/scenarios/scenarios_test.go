// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/baton-epp/baton/internal/leaktest"
	"github.com/baton-epp/baton/simulate"
)

const (
	recorded = "testdata/vllm-0.32.json"
	guide    = "../../docs/disaggregation.md"
)

var update = flag.Bool("update", false, "rewrite the table in docs/disaggregation.md")

// different lists, as key/fact, what simulated engines do otherwise than the vLLM that was recorded, and why.
var different = map[string]string{
	"n-decode/late notifications":   "vLLM's prefill server hears of the pull of each answer, the simulated one once of all",
	"baton-n/late notifications":    "as n-decode",
	"restart-fail/failed transfers": "vLLM counts the failed pull and the notification of it, which fails too",
}

// TestMain fails the package when goroutines outlive its tests.
func TestMain(m *testing.M) { os.Exit(leaktest.Run(m)) }

// TestSimulatedAsRecorded runs every scenario on simulated engines and compares each outcome with what a real vLLM did,
// and the table in the guide with both.
func TestSimulatedAsRecorded(t *testing.T) {
	want, err := readRows(recorded)
	if err != nil {
		t.Fatal(err)
	}
	all := scenarios()
	got := make([]row, len(all))
	t.Run("scenarios", func(t *testing.T) {
		for i, s := range all {
			t.Run(s.key, func(t *testing.T) {
				t.Parallel()
				got[i] = simulatedLab(t).run(t.Context(), s)
			})
		}
	})
	if len(want) != len(got) {
		t.Fatalf("%d scenarios recorded, %d run", len(want), len(got))
	}
	used := map[string]bool{}
	for i := range want {
		sameRow(t, &want[i], &got[i], used)
	}
	for key := range different {
		if !used[key] {
			t.Errorf("%s is listed as different and is not", key)
		}
	}
	if !t.Failed() {
		documented(t, table([]column{{"vLLM 0.32.0", want}, {"Simulated engine", got}}))
	}
}

// sameRow compares one scenario's outcomes fact by fact.
func sameRow(t *testing.T, want, got *row, used map[string]bool) {
	t.Helper()
	if want.Key != got.Key || want.Scenario != got.Scenario || len(want.Facts) == 0 {
		t.Errorf("recorded %s (%s) with %d facts, ran %s (%s)", want.Key, want.Scenario, len(want.Facts), got.Key, got.Scenario)
		return
	}
	facts := map[string]bool{}
	for _, f := range append(want.Facts, got.Facts...) {
		facts[f.Of] = true
	}
	for of := range facts {
		if want.fact(of) == got.fact(of) {
			continue
		}
		key := want.Key + "/" + of
		used[key] = true
		if different[key] == "" {
			t.Errorf("%s: vLLM %q, simulated %q", key, want.fact(of), got.fact(of))
		}
	}
}

// documented holds the guide to the table.
func documented(t *testing.T, want string) {
	t.Helper()
	text, err := os.ReadFile(guide)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(text), "\n"+want) {
		return
	}
	head, rest, found := strings.Cut(string(text), "\n| Scenario |")
	_, tail, ends := strings.Cut(rest, "\n\n")
	if !*update || !found || !ends {
		t.Errorf("docs/disaggregation.md lacks this table (-update puts it in the place of the one there):\n%s", want)
		return
	}
	if err := os.WriteFile(guide, []byte(head+"\n"+want+"\n"+tail), 0o600); err != nil {
		t.Fatal(err)
	}
}

// simulatedLab is a pair of engines, a third one that decodes with the other policy, and what the command line would set.
func simulatedLab(t *testing.T) *lab {
	t.Helper()
	const lease = 2 * time.Second // long beside everything else that happens, also on a slow machine
	peers := simulate.NewRegistry()
	start := func(role, policy string) *simulate.Engine {
		e, err := simulate.New(simulate.Options{
			Name: role + "-" + policy, Role: role, Peers: peers, BlockSize: 32, NumBlocks: 1200, MaxNumSeqs: 8, MaxModelLen: 8192,
			LoadFailurePolicy: policy, Lease: lease, InterToken: time.Millisecond,
			PrefillPerToken: 200 * time.Microsecond, // long prompts take longer than a look at the metrics
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := e.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = e.Close() })
		return e
	}
	prefill, decode, recompute := start("prefill", "fail"), start("decode", "fail"), start("decode", "recompute")
	l := newLab(options{
		prefill: prefill.URL(), decode: decode.URL(), recompute: recompute.URL(), model: "tiny", lease: lease, deadly: true,
	})
	l.soon = answerLimit                                                 // the machine may be slow; the lease is told from it by the engine's count
	l.restart = func(context.Context) error { return prefill.Restart() } //nolint:contextcheck // binding a loopback port needs no context
	t.Cleanup(func() {
		if err := l.close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// TestCommand runs the program as a user does: some scenarios, a record, and a table beside another record.
func TestCommand(t *testing.T) {
	l := simulatedLab(t)
	dir := t.TempDir()
	record, markdown := filepath.Join(dir, "rows.json"), filepath.Join(dir, "table.md")
	var out, errs strings.Builder
	err := command(t.Context(), []string{
		"-prefill", l.prefill.url, "-decode", l.decode.url, "-lease", l.lease.String(), "-only", "^(pair|min-tokens|restart-fail)$",
		"-record", record, "-markdown", markdown, "-against", recorded,
	}, &out, &errs)
	if err != nil || errs.Len() > 0 {
		t.Fatal(err, errs.String())
	}
	rows, err := readRows(record)
	if err != nil {
		t.Fatal(err)
	}
	if len(rows) != 3 || rows[0].fact("pulled") != "the whole prompt" || len(rows[2].Facts) != 0 {
		t.Errorf("recorded %+v", rows)
	}
	text, err := os.ReadFile(markdown)
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(text), "not run"); !strings.Contains(string(text), "| the same |") || n != len(scenarios())-2 {
		t.Errorf("%d scenarios not run in the table:\n%s", n, text)
	}
	for _, bad := range [][]string{{}, {"-prefill", "http://127.0.0.1:1"}, {"-prefill", "a", "-decode", "b", "-only", "("}} {
		if err := command(t.Context(), bad, &out, &errs); err == nil {
			t.Errorf("%v: no error", bad)
		}
	}
}
