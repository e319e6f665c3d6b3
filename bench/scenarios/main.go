// SPDX-License-Identifier: Apache-2.0

// Command scenarios uses and misuses the NIXL wire between a prefill and a decode server, real or simulated, first
// directly and then through Baton, and says what came of it: status, text, handles, and what the servers' own metrics
// count. The one type is the [lab], the servers under observation.
//
// The outcomes are words, not times, so that those of a real vLLM can be kept and a simulated engine be held to them.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"regexp"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := command(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "scenarios: "+err.Error())
		os.Exit(1)
	}
}

// options are what the command line sets.
type options struct {
	prefill, decode, recompute string
	model, restart             string
	lease                      time.Duration
	deadly                     bool
	only                       string
	record, markdown, against  string
}

func parseOptions(args []string, stderr io.Writer) (options, error) {
	var o options
	f := flag.NewFlagSet("scenarios", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.StringVar(&o.prefill, "prefill", "", "`URL` of the prefill server")
	f.StringVar(&o.decode, "decode", "", "`URL` of the decode server, with kv_load_failure_policy fail")
	f.StringVar(&o.recompute, "recompute", "", "`URL` of another decode server, with kv_load_failure_policy recompute")
	f.StringVar(&o.model, "model", "tiny", "served model `name`")
	f.StringVar(&o.restart, "restart-prefill", "", "shell `command` that kills the prefill server and has it started again; returns when the old one is gone")
	f.DurationVar(&o.lease, "lease", defaultLease, "the servers' kv_lease_duration: bounds the waits")
	f.BoolVar(&o.deadly, "deadly", false, "run, last, what ends a decode server's process")
	f.StringVar(&o.only, "only", "", "run the scenarios whose key matches `REGEXP`")
	f.StringVar(&o.record, "record", "", "write the outcomes to `FILE`, as JSON")
	f.StringVar(&o.markdown, "markdown", "", "write the outcomes to `FILE`, as a table")
	f.StringVar(&o.against, "against", "", "a recorded `FILE` to put beside them in the table")
	if err := f.Parse(args); err != nil {
		return o, err //nolint:wrapcheck // says all there is
	}
	if o.prefill == "" || o.decode == "" || f.NArg() > 0 {
		return o, errors.New("usage: scenarios -prefill URL -decode URL [flags]; -help lists them")
	}
	return o, nil
}

func command(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	o, err := parseOptions(args, stderr)
	if err != nil {
		return err
	}
	only, err := regexp.Compile(o.only)
	if err != nil {
		return fmt.Errorf("-only: %w", err)
	}
	l := newLab(o)
	var rows []row
	for _, s := range scenarios() {
		if !only.MatchString(s.key) {
			continue
		}
		r := l.run(ctx, s)
		fmt.Fprintf(stdout, "%s (%s): %s\n", r.Key, r.Took, r.outcome())
		rows = append(rows, r)
	}
	return errors.Join(ctx.Err(), l.close(), o.write(rows))
}

// write leaves the outcomes in the files that were asked for.
func (o options) write(rows []row) error {
	if o.record != "" {
		text, err := json.MarshalIndent(rows, "", "  ")
		if err != nil {
			return err //nolint:wrapcheck // cannot happen: rows hold strings
		}
		if err := os.WriteFile(o.record, append(text, '\n'), 0o600); err != nil { //nolint:gosec // where the user says
			return fmt.Errorf("-record: %w", err)
		}
	}
	if o.markdown == "" {
		return nil
	}
	columns := []column{{"These servers", rows}}
	if o.against != "" {
		recorded, err := readRows(o.against)
		if err != nil {
			return fmt.Errorf("-against: %w", err)
		}
		columns = []column{{o.against, recorded}, columns[0]}
	}
	if err := os.WriteFile(o.markdown, []byte(table(columns)), 0o600); err != nil {
		return fmt.Errorf("-markdown: %w", err)
	}
	return nil
}

// newLab is the lab of the command line.
func newLab(o options) *lab {
	l := &lab{
		prefill: newServer(o.prefill), decode: newServer(o.decode), model: o.model,
		lease: o.lease, soon: time.Second, deadly: o.deadly,
	}
	if o.recompute != "" {
		l.recompute = newServer(o.recompute)
	}
	if o.restart != "" {
		l.restart = func(ctx context.Context) error {
			out, err := exec.CommandContext(ctx, "sh", "-c", o.restart).CombinedOutput() //nolint:gosec // the user's own command
			if err != nil {
				return fmt.Errorf("-restart-prefill: %w\n%s", err, out)
			}
			return nil
		}
	}
	return l
}
