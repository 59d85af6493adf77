"""Scores of a merged model beside those of its experts, under named protocols."""
