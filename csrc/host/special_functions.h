// Special functions in f64, following the definitions (domains, poles, limits) of XLA's chlo decompositions.
#pragma once

namespace jax_mpk::host::special {

double lgamma(double x);
double digamma(double x);
double bessel_i0e(double x);
double bessel_i1e(double x);
double erf_inv(double x);
double igamma(double a, double x);
double igammac(double a, double x);
double igamma_grad_a(double a, double x);
double random_gamma_grad(double a, double x);
double zeta(double x, double q);
double polygamma(double n, double x);
double betainc(double a, double b, double x);

}  // namespace jax_mpk::host::special
