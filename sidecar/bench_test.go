// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/internal/alloctest"
)

// instant is a prefill endpoint that costs next to nothing: a goroutine per connection and no HTTP library.
func instant(tb testing.TB) string {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = l.Close() })
	reply := []byte("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: " + strconv.Itoa(len(goodAnswer)) + "\r\n\r\n" + goodAnswer)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go serveInstant(c, reply)
		}
	}()
	return l.Addr().String()
}

func serveInstant(c net.Conn, reply []byte) {
	defer c.Close()
	buf := make([]byte, 1<<20)
	for have := 0; ; {
		n, err := c.Read(buf[have:])
		if err != nil {
			return
		}
		have += n
		head := strings.Index(string(buf[:min(have, 2048)]), "\r\n\r\n")
		if head < 0 {
			continue
		}
		_, length, _ := strings.Cut(string(buf[:head]), "Content-Length: ")
		length, _, _ = strings.Cut(length, "\r\n")
		size, _ := strconv.Atoi(length)
		if have < head+4+size {
			continue
		}
		have = 0
		if _, err := c.Write(reply); err != nil {
			return
		}
	}
}

func benchBody(size int) string {
	return `{"model":"tiny","messages":[{"role":"user","content":"` + strings.Repeat("word ", size/5) + `"}],"max_tokens":64,"stream":true}`
}

// BenchmarkRun is one orchestrated request against an endpoint that answers at once: what Baton adds to the call.
// BenchmarkCall is the same call by hand.
func BenchmarkRun(b *testing.B) {
	for _, size := range []int{4 << 10, 8 << 10, 400 << 10} {
		b.Run("bytes="+strconv.Itoa(size), func(b *testing.B) {
			r := newRig(b, nil)
			p := r.add("p", "prefill", instant(b))
			d := r.add("d", "decode", "10.9.9.9:8000")
			j := r.job(inference.Chat, benchBody(size), d, p)
			b.SetBytes(int64(j.Request.Body.Len))
			b.ReportAllocs()
			cpu := cpuTime()
			for b.Loop() {
				benchRun(b, r, j)
			}
			b.ReportMetric(float64(cpuTime()-cpu)/float64(b.N), "cpu-ns/op")
		})
	}
}

func benchRun(tb testing.TB, r *rig, j *Job) {
	tb.Helper()
	j.Body = j.Request.Edit()
	out, err := r.Run(tb.Context(), j)
	if err != nil || !out.HasHandle {
		tb.Fatalf("%+v, %v", out, err)
	}
	_ = r.Forward(tb.Context(), j, out, j.Decode)
	if j.Body.Len() == 0 {
		tb.Fatal("empty")
	}
}

func BenchmarkCall(b *testing.B) {
	for _, size := range []int{4 << 10, 8 << 10, 400 << 10} {
		b.Run("bytes="+strconv.Itoa(size), func(b *testing.B) {
			addr, body := instant(b), benchBody(size)
			tr := &http.Transport{}
			defer tr.CloseIdleConnections()
			b.SetBytes(int64(len(body)))
			b.ReportAllocs()
			cpu := cpuTime()
			for b.Loop() {
				req, err := http.NewRequestWithContext(b.Context(), http.MethodPost, "http://"+addr+"/v1/chat/completions", strings.NewReader(body))
				if err != nil {
					b.Fatal(err)
				}
				resp, err := tr.RoundTrip(req)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadAll(resp.Body); err != nil {
					b.Fatal(err)
				}
				_ = resp.Body.Close()
			}
			b.ReportMetric(float64(cpuTime()-cpu)/float64(b.N), "cpu-ns/op")
		})
	}
}

// cpuTime is what this process used so far, in nanoseconds, the endpoint's part included.
func cpuTime() int64 {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return u.Utime.Nano() + u.Stime.Nano()
}

// TestAllocations is the ceiling for one orchestrated request, net/http's share (56, see BenchmarkCall) included.
func TestAllocations(t *testing.T) {
	r := newRig(t, nil)
	p, d := r.add("p", "prefill", instant(t)), r.add("d", "decode", "10.9.9.9:8000")
	j := r.job(inference.Chat, benchBody(8<<10), d, p)
	benchRun(t, r, j)
	alloctest.AtMost(t, 115, "a request", func() { benchRun(t, r, j) })
}
