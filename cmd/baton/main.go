// SPDX-License-Identifier: Apache-2.0

// Command baton is an Endpoint Picker for Gateway API InferencePools: baton serve answers a gateway's ext_proc calls,
// baton check reads a configuration as serve would, baton simulate runs a pool of simulated model servers.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
)

// version is set by the build (-ldflags -X main.version).
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	err := newRoot().ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "baton: "+strings.ReplaceAll(err.Error(), "\n", "\nbaton: "))
		os.Exit(1)
	}
}

// newRoot is the command tree; baton alone means baton serve, as with llm-d's picker.
func newRoot() *cobra.Command {
	root := newServe()
	root.Use = "baton"
	root.Short = "Endpoint Picker for InferencePools that runs encode and prefill itself"
	root.Long = root.Short + ".\n\nWithout a subcommand it serves, taking the flags of baton serve."
	root.Version = version
	root.SilenceUsage, root.SilenceErrors = true, true
	root.AddCommand(newServe(), newCheck(), newSimulate())
	return root
}

// logger writes structured lines to standard error; verbosity is llm-d's -v: up to 2 info, 3 and above debug.
func logger(verbosity int, asJSON bool) *slog.Logger {
	options := &slog.HandlerOptions{Level: slog.LevelInfo}
	if verbosity > 2 {
		options.Level = slog.LevelDebug
	}
	if asJSON {
		return slog.New(slog.NewJSONHandler(os.Stderr, options))
	}
	return slog.New(slog.NewTextHandler(os.Stderr, options))
}
