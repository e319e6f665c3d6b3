// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"

	"github.com/baton-epp/baton/simulate"
)

// farmed is what the farm says on its first line.
type farmed struct {
	Addrs []string `json:"addrs"`
}

// farmCommand serves idle simulated endpoints, with vLLM's real metrics page, until standard input ends.
func farmCommand(ctx context.Context, args []string, stdin io.Reader, stdout io.Writer) error {
	fs := flag.NewFlagSet("bench farm", flag.ContinueOnError)
	n := fs.Int("endpoints", 10, "how many")
	file := fs.String("file", "", "`path` of the endpoints file to write for file-discovery")
	if err := fs.Parse(args); err != nil {
		return err
	}
	ctx, cancel := untilEOF(ctx, stdin)
	defer cancel()
	pool, err := simulate.NewPool(simulate.PoolOptions{Plain: *n, Template: simulate.Options{RecordBodies: -1}})
	if err != nil {
		return fmt.Errorf("farm: %w", err)
	}
	if err := pool.Start(); err != nil { //nolint:contextcheck // binding a loopback port waits for nothing
		return fmt.Errorf("farm: %w", err)
	}
	var said farmed
	for _, e := range pool.Engines() {
		said.Addrs = append(said.Addrs, e.Addr().String())
	}
	if *file != "" {
		err = pool.WriteEndpoints(*file)
	}
	if err == nil {
		err = writeLine(stdout, said)
	}
	if err == nil {
		<-ctx.Done()
	}
	return errors.Join(err, pool.Close())
}

// writeLine writes v as one line of JSON.
func writeLine(w io.Writer, v any) error {
	line, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = w.Write(append(line, '\n'))
	return err
}

// freePorts finds ports that nobody listens on now.
func freePorts(ctx context.Context, n int) ([]int, error) {
	ports := make([]int, 0, n)
	for range n {
		ln, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
		if err != nil {
			return nil, fmt.Errorf("free port: %w", err)
		}
		defer ln.Close() // held until all are found, so that they differ
		ports = append(ports, ln.Addr().(*net.TCPAddr).Port)
	}
	return ports, nil
}
