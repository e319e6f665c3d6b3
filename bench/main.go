// SPDX-License-Identifier: Apache-2.0

// Command bench measures what Baton costs beside an ext_proc server that does nothing (the floor): CPU per request,
// decision latency, requests per second and memory, under the same load in turn. The one type is the suite in cases.go.
// It starts itself again for each part, so that every CPU second has one owner:
//
//	bench floor   the no-op server, measured as Baton is
//	bench farm    endpoints that serve vLLM's real metrics page, not counted
//	bench load    a client that speaks ext_proc as Envoy does, not counted
//
// "bench orchestrate" is a measurement of its own: what it costs that Baton issues the prefill itself.
//
// Times are reported beside their targets and never asserted; a request that goes wrong ends the run with an error.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"syscall"
)

func main() {
	// The kernel ends our children when the thread that started them is gone: let it live as long as the program.
	runtime.LockOSThread()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := command(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "bench: "+err.Error())
		os.Exit(1)
	}
}

// command runs the comparison, or the part named by the first argument. The parts end when stdin does, so that they
// never outlive the comparison.
func command(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	part := ""
	if len(args) > 0 {
		part = args[0]
	}
	switch part {
	case partFloor:
		return floorCommand(ctx, args[1:], stdin, stdout)
	case partFarm:
		return farmCommand(ctx, args[1:], stdin, stdout)
	case partLoad:
		return loadCommand(ctx, args[1:], stdin, stdout)
	case "orchestrate":
		return orchestrateCommand(ctx, args[1:], stdout, stderr)
	}
	o, err := parseOptions(args, stderr)
	if err != nil {
		return err
	}
	return compare(ctx, o, stdout, stderr)
}

// Names of the parts, as the first argument.
const (
	partFloor = "floor"
	partFarm  = "farm"
	partLoad  = "load"
)

// untilEOF returns a context that ends when stdin does.
func untilEOF(ctx context.Context, stdin io.Reader) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		_, _ = io.Copy(io.Discard, stdin)
		cancel()
	}()
	return ctx, cancel
}
