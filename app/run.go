// SPDX-License-Identifier: Apache-2.0

package app

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"runtime"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sync/errgroup"
)

// listen opens every port before anything is served, so that a taken port is one clear error.
func (a *App) listen() error {
	if a.opts.GRPCPort >= 0 {
		l, err := a.tcp("--grpc-port", a.opts.GRPCPort)
		if err := a.answerOn(l, false, err); err != nil {
			return err
		}
	}
	if a.opts.GRPCSocket != "" {
		l, err := unixSocket(a.opts.GRPCSocket)
		if err := a.answerOn(l, true, err); err != nil {
			return err
		}
	}
	var err error
	if a.opts.HealthPort >= 0 {
		if a.healthListener, err = a.tcp("--grpc-health-port", a.opts.HealthPort); err != nil {
			return err
		}
	}
	if a.opts.MetricsPort >= 0 {
		if a.metricsListener, err = a.tcp("--metrics-port", a.opts.MetricsPort); err != nil {
			return err
		}
		a.metricsServer = &http.Server{Handler: a.metricsHandler(), ReadHeaderTimeout: 5 * time.Second}
	}
	return nil
}

// answerOn makes the gRPC server of an ext_proc listener, unless err says that there is none.
func (a *App) answerOn(l net.Listener, plain bool, err error) error {
	if err != nil {
		return err
	}
	if a.cert != nil && !plain {
		config, err := a.tlsConfig()
		if err != nil {
			return err
		}
		// TLS below gRPC rather than by its credentials: those refuse gateways that name no protocol (ALPN).
		l = tls.NewListener(l, config)
	}
	a.endpoints = append(a.endpoints, endpoint{l, a.newServer()})
	return nil
}

func (a *App) tcp(flag string, port int) (net.Listener, error) {
	l, err := net.Listen("tcp", net.JoinHostPort(a.opts.BindAddress, strconv.Itoa(port))) //nolint:noctx // opened at start, nothing to cancel
	if err != nil {
		return nil, fmt.Errorf("%s %d: %w", flag, port, err)
	}
	return l, nil
}

// unixSocket listens on path; a socket that a dead process left behind is replaced.
func unixSocket(path string) (net.Listener, error) {
	if info, err := os.Lstat(path); err == nil && info.Mode()&os.ModeSocket != 0 {
		if conn, err := net.DialTimeout("unix", path, time.Second); err == nil { //nolint:noctx // bounded by its own timeout
			_ = conn.Close() // it was only a question
			return nil, fmt.Errorf("--grpc-socket %s: another process listens there", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("--grpc-socket: %w", err)
		}
	}
	l, err := net.Listen("unix", path) //nolint:noctx // opened at start, nothing to cancel
	if err != nil {
		return nil, fmt.Errorf("--grpc-socket: %w", err)
	}
	return l, nil
}

func (a *App) closeListeners() {
	for _, e := range a.endpoints {
		_ = e.listener.Close() // nothing was served on it
	}
	for _, l := range []net.Listener{a.healthListener, a.metricsListener} {
		if l != nil {
			_ = l.Close()
		}
	}
}

// metricsHandler serves metrics and, where asked for, the debug pages.
func (a *App) metricsHandler() http.Handler {
	a.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	info := prometheus.NewGaugeVec(prometheus.GaugeOpts{ //nolint:promlinter // llm-d's name
		Name: "llm_d_epp_info", Help: "Always 1; what runs.",
	}, []string{"commit", "build_ref"})
	info.WithLabelValues("", a.opts.Version).Set(1)
	a.registry.MustRegister(info)
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(a.registry, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError}))
	if a.opts.EnableDebug {
		mux.HandleFunc("GET /debug/decisions", a.decisions.serveDecisions)
		mux.HandleFunc("GET /debug/endpoints", serveEndpoints(a.store.Snapshot))
	}
	if a.opts.EnablePprof {
		mux.HandleFunc("/debug/pprof/", pprof.Index)
		mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
		mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	}
	return mux
}

// Run serves until ctx ends, then drains: NOT_SERVING, a while later GOAWAY, and after the drain time whatever is left is
// cut (docs/design.md 5.3). It returns when every goroutine has ended.
func (a *App) Run(ctx context.Context) error {
	if a.tracing != nil {
		defer a.stopTracing(ctx)
	}
	// What serves must outlive the signal: it is the drain that ends it.
	serving, stopServing := context.WithCancel(context.WithoutCancel(ctx))
	defer stopServing()
	g, gctx := errgroup.WithContext(serving)
	a.startBackground(gctx, g)
	a.startServers(g)
	a.log.Info("serving", slog.String("address", a.Addr().String()), slog.Bool("tls", a.cert != nil),
		slog.String("configuration", a.describe()), slog.String("version", a.opts.Version))
	select {
	case <-ctx.Done():
		a.log.Info("draining; a second signal ends at once", slog.String("reason", context.Cause(ctx).Error()),
			slog.Float64("seconds", (a.opts.DrainDelay+a.opts.DrainTimeout).Seconds()))
	case <-gctx.Done():
	}
	a.drain(gctx)
	stopServing()
	err := joined(g.Wait())
	runtime.KeepAlive(a.heapFloor)
	a.log.Info("stopped")
	return err
}

func (a *App) stopTracing(ctx context.Context) {
	// The process is ending: the last spans get their own short time.
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if err := a.tracing.Shutdown(last); err != nil {
		a.log.Warn("last spans not delivered", slog.Any("err", err))
	}
}

func (a *App) startBackground(ctx context.Context, g *errgroup.Group) {
	g.Go(func() error { return joined(a.store.Run(ctx)) })
	g.Go(func() error { return joined(a.scraper.Run(ctx)) })
	if a.cert != nil && a.cert.dir != "" && a.opts.CertReload {
		g.Go(func() error { a.cert.watch(ctx, a.log); return nil })
	}
	if a.opts.ConfigFile != "" {
		m := newConfigMetrics(a.registry)
		g.Go(func() error { a.watchConfig(ctx, m); return nil })
	}
}

func (a *App) startServers(g *errgroup.Group) {
	for _, e := range a.endpoints {
		g.Go(func() error { return joined(e.server.Serve(e.listener)) })
	}
	if a.healthListener != nil {
		g.Go(func() error { return joined(a.healthServer.Serve(a.healthListener)) })
	}
	if a.metricsListener != nil {
		g.Go(func() error {
			if a.opts.MetricsCertDir == "" {
				return joined(a.metricsServer.Serve(a.metricsListener))
			}
			return joined(a.metricsServer.ServeTLS(a.metricsListener, a.opts.MetricsCertDir+"/tls.crt", a.opts.MetricsCertDir+"/tls.key"))
		})
	}
}

// drain ends serving without losing a request. Its own waits are bounded by DrainDelay and DrainTimeout.
func (a *App) drain(ctx context.Context) {
	a.health.drain()
	if a.server.Streams() > 0 || a.opts.DrainDelay > 0 {
		wait(ctx, a.opts.DrainDelay)
	}
	a.server.Drain()
	rest, cancel := context.WithTimeout(ctx, a.opts.DrainTimeout)
	defer cancel()
	graceful := make(chan struct{})
	go func() {
		defer close(graceful)
		var all sync.WaitGroup
		for _, e := range a.endpoints {
			all.Go(e.server.GracefulStop)
		}
		all.Wait()
	}()
	select {
	case <-graceful:
	case <-time.After(a.opts.DrainTimeout):
		a.server.Cut()
		wait(ctx, 100*time.Millisecond) // quiet streams end in order, held requests are answered; the rest is cut
		if left := a.server.Abort(); left > 0 {
			a.log.Warn("streams cut at the end of the drain time", slog.Int64("streams", left))
		}
		for _, e := range a.endpoints {
			e.server.Stop()
		}
		<-graceful
	}
	a.orchestrator.Shutdown(rest) // prefills whose decode the gateway has, and whose streams it ended
	a.healthServer.Stop()
	if a.metricsServer != nil {
		_ = a.metricsServer.Close() // followers of /debug/decisions are cut
	}
}

// wait sleeps for d, or until ctx ends.
func wait(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
