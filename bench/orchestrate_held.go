// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/baton-epp/baton/internal/gatewaytest"
)

// hold keeps requests waiting for their prefill and reads the picker's memory meanwhile.
func (o *orchestration) hold(ctx context.Context, r *orchestrated) error {
	o.suite.say("holding %d requests of %d bytes ...", o.held, o.heldBody)
	on, err := o.picker(ctx, "orchestrate")
	if err != nil {
		return err
	}
	defer on.stop()
	r.idlePeak = peakOf(on.pid())
	fault := `{"rules":[{"phase":"prefill","kind":"hang"}]}`
	for _, p := range o.prefillers {
		resp, err := http.Post("http://"+p+"/admin/faults", "application/json", strings.NewReader(fault)) //nolint:noctx // on loopback
		if err != nil {
			return err
		}
		_ = resp.Body.Close()
	}
	g, err := gatewaytest.New(gatewaytest.Options{Picker: on.addr, Request: gatewaytest.Duplex})
	if err != nil {
		return err
	}
	defer func() { _ = g.Close() }()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var running sync.WaitGroup
	for n := range o.held {
		body := promptOf(n, o.heldBody)
		running.Go(func() { _, _ = g.Do(ctx, "/v1/chat/completions", body) }) // ended by cancel
		wait(ctx, time.Millisecond)
	}
	for waited := time.Duration(0); r.heldSeen < o.held && waited < time.Minute; waited += 100 * time.Millisecond {
		if r.heldSeen, r.heldBytes, err = heldNow(ctx, on.metrics); err != nil {
			return err
		}
		wait(ctx, 100*time.Millisecond)
	}
	wait(ctx, o.heldFor)
	r.heldPeak = peakOf(on.pid())
	cancel()
	running.Wait()
	return nil
}

// heldNow reads how many prefills are in flight, and the bytes of their bodies.
func heldNow(ctx context.Context, metrics string) (n int, size int64, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+metrics+"/metrics", nil)
	if err != nil {
		return 0, 0, err
	}
	resp, err := new(http.Client).Do(req)
	if err != nil {
		return 0, 0, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	for line := range strings.SplitSeq(string(text), "\n") {
		if v, ok := strings.CutPrefix(line, `baton_sidecar_in_flight{phase="prefill"} `); ok {
			f, _ := strconv.ParseFloat(v, 64) // our own page
			n = int(f)
		}
		if v, ok := strings.CutPrefix(line, "baton_admission_held_bytes "); ok {
			f, _ := strconv.ParseFloat(v, 64)
			size = int64(f)
		}
	}
	return n, size, err
}
