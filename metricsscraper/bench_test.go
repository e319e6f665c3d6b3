// SPDX-License-Identifier: Apache-2.0

package metricsscraper

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/baton-epp/baton/pool"
)

// farmSize is the number of idle endpoints of BenchmarkIdle.
const farmSize = 100

// TestFarm is no test: BenchmarkIdle runs it as a process of its own, so that the servers' CPU is not counted.
func TestFarm(t *testing.T) {
	kind := os.Getenv("BATON_FARM")
	if kind == "" {
		t.Skip("only run by BenchmarkIdle")
	}
	whole := pages(t)["vllm_idle.prom"]
	tb := DefaultEngines().tables["vllm"]
	cached := []byte(filtered(string(whole), tb))
	var plain []byte
	for line := range strings.Lines(string(cached)) {
		if !strings.Contains(line, "cache_config_info") {
			plain = append(plain, line...)
		}
	}
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		page := whole
		if kind == "filtered" && r.URL.RawQuery != "" {
			if page = plain; strings.Contains(r.URL.RawQuery, "cache_config_info") {
				page = cached
			}
		}
		_, _ = w.Write(page)
	})
	for range farmSize {
		srv := httptest.NewServer(handler)
		defer srv.Close()
		fmt.Printf("farm %s\n", srv.Listener.Addr()) // read by BenchmarkIdle
	}
	_, _ = io.Copy(io.Discard, os.Stdin) // until BenchmarkIdle closes it
}

// BenchmarkIdle reports the cores that 100 idle endpoints cost, over loopback, with vLLM's real page. Each iteration
// is one second:
//
//	go test -run xxx -bench Idle -benchtime 20x ./metricsscraper
func BenchmarkIdle(b *testing.B) {
	for _, kind := range []string{"whole", "filtered"} {
		b.Run("endpoints=100/page="+kind, func(b *testing.B) {
			endpoints := farm(b, kind)
			s, err := New(options())
			if err != nil {
				b.Fatal(err)
			}
			s.Sync(snapshot(endpoints...))
			done := make(chan error)
			go func() { done <- s.Run(b.Context()) }()
			<-time.After(5 * time.Second) // connections are made, phases spread
			for _, e := range endpoints {
				if !e.Metrics().Fresh(time.Now()) {
					b.Fatalf("%s was not scraped", e.Hostport)
				}
			}
			before := cpu(b)
			b.ResetTimer()
			for range b.N {
				<-time.After(time.Second)
			}
			b.StopTimer()
			b.ReportMetric((cpu(b)-before).Seconds()/float64(b.N), "cores")
			s.Close()
			if err := <-done; err != nil {
				b.Error(err)
			}
		})
	}
}

// farm starts the servers and returns their endpoints.
func farm(b *testing.B, kind string) []*pool.Endpoint {
	b.Helper()
	cmd := exec.CommandContext(b.Context(), os.Args[0], "-test.run", "^TestFarm$", "-test.v")
	cmd.Env = append(os.Environ(), "BATON_FARM="+kind)
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = in.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	endpoints := make([]*pool.Endpoint, 0, farmSize)
	for len(endpoints) < farmSize {
		var word, addr string
		if _, err := fmt.Fscanln(out, &word, &addr); err != nil && addr == "" && word == "" {
			b.Fatal(err)
		}
		if _, err := net.ResolveTCPAddr("tcp", addr); err == nil && word == "farm" {
			endpoints = append(endpoints, endpoint(addr))
		}
	}
	return endpoints
}

// cpu is the processor time of this process so far.
func cpu(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
